"""Revisions: response → critique → revision, one to five times (Bai et al. 2022, section 3.1)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from solon.engines import OnFailure
from solon.engines.sampling import SamplingSettings
from solon.records import Prompt, RevisionChain
from solon.runs.options import CONSTITUTION, MAX_CONNECTIONS, MODEL, OUT, REQUIRED, Option, Verb
from solon.settings import Settings, Tokens
from solon.stages.artifacts import CHAINS, DATA, START_MODEL, WARM_MODEL
from solon.stages.base import Stage

if TYPE_CHECKING:
    from solon.runs.call import Call
    from solon.runs.run import Run
    from solon.stages.plan import Plan


class RevisionSampling(SamplingSettings):
    """At temperature 0.7 without top-p a small model writes word salad."""

    max_tokens: Tokens = 96
    """Tokens of a response, a critique or a revision at most."""
    temperature: float = Field(0.5, ge=0)
    """Temperature of sampling; 0 takes the most probable token."""
    top_p: float = Field(0.9, gt=0, le=1)
    """Sample among the most probable tokens that together hold this probability."""
    repetition_penalty: float = Field(1.15, gt=0)
    """Above 1, a small model repeats itself and its prompt less; a server usually knows no such penalty."""


class RevisionSettings(Settings):
    """Critique and revision."""

    revisions: int = Field(2, ge=1, le=5)
    """Critique-and-revision steps, each under a principle drawn by its weight."""
    critique: bool = True
    """Criticise before each revision; false: revise directly."""
    few_shot: int | None = Field(None, ge=0)
    """How many of a principle's examples to show before each request; null: all of them."""
    responder: Literal["self", "start"] = "self"
    """Who writes the first response: the model that criticises, or the start model."""
    sampling: RevisionSampling = RevisionSampling()
    """How responses, critiques and revisions are sampled."""


class Revisions(Stage):
    name = "revisions"
    part, settings, optional = "supervised", RevisionSettings, True
    needs, uses, makes = (DATA, START_MODEL), (WARM_MODEL,), (CHAINS,)

    def estimate(self, plan: Plan) -> None:
        from solon.stages.plan import FILLED

        part, n = plan.recipe.of(RevisionSettings), len(plan.data.prompts)
        text = part.sampling.max_tokens * FILLED
        texts = 1 + part.revisions * (2 if part.critique else 1)
        step = plan.prompt + text + plan.request + (plan.prompt + 2 * text + 2 * plan.request)
        plan.add(self.name, n, read=n * (plan.prompt + part.revisions * step), written=n * texts * text)

    def run(self, run: Run) -> None:
        from solon.supervised.critique_revision import revise

        part = run.recipe.of(RevisionSettings)
        with run.engine(run.get(WARM_MODEL, START_MODEL)) as engine, run.engine(run.get(START_MODEL)) as start:

            def make(batch: Sequence[Prompt]) -> Iterator[RevisionChain]:
                return revise(
                    batch, engine, run.constitution, revisions=part.revisions, sampling=part.sampling.sampling(),
                    seed=run.recipe.seed, direct=not part.critique, few_shot=part.few_shot,
                    responder=start if part.responder == "start" else None,
                    meta=run.meta(engine, sampling=part.sampling.model_dump()), failed=run.fail,
                )  # fmt: skip

            prompts, engines = run.get(DATA).prompts, (engine, start)
            chains = run.records(self.name, prompts, make, RevisionChain, engines=engines, noun="chains")
        run.put(CHAINS, chains)


class Critique(Verb):
    """Revision chains: response → critique → revision.

    Example: `solon critique --prompts solon:red-team --limit 4 --out chains.jsonl`
    """

    name = "critique"
    takes = (
        Option("prompts", str, REQUIRED, "Prompts (.jsonl), or a shipped set such as solon:red-team."),
        OUT, CONSTITUTION, MODEL, MAX_CONNECTIONS,
        Option("direct", bool, False, "Revise without a critique."),
        Option("repetition_penalty", float | None, None, "Above 1, a small model repeats itself less; 1.15, for a server 1.", 0.01),
    )  # fmt: skip
    settings = (RevisionSettings,)
    hidden = ("critique", "responder")

    def run(self, call: Call) -> None:
        from solon.constitution import of_constitution
        from solon.data import read_prompts
        from solon.engines import is_remote
        from solon.engines.identity import of_engine
        from solon.supervised.critique_revision import revise

        rules, part, direct = call.constitution, call.of(RevisionSettings), call["direct"]
        served = is_remote(call["model"])
        penalty = call["repetition_penalty"] or (1.0 if served else RevisionSampling().repetition_penalty)
        sampling = part.sampling.model_copy(update={"repetition_penalty": penalty}).sampling()
        empty: Counter[str] = Counter()
        with call.engine() as engine:

            def make(batch: Sequence[Prompt], failed: OnFailure) -> Iterator[RevisionChain]:
                return revise(
                    batch, engine, rules, revisions=part.revisions, sampling=sampling, seed=call.seed, direct=direct,
                    few_shot=part.few_shot, meta=call.meta(engine, sampling=sampling.to_json()), failed=failed,
                )  # fmt: skip

            def seen(chain: RevisionChain) -> None:
                if not any(text.strip() for text in (chain.response, *(s.revision for s in chain.steps))):
                    empty["the model's answers are empty"] += 1

            with call.file([call["prompts"], call["model"]]) as target:
                items = read_prompts(call["prompts"])[: call.limit]
                identity = {
                    **of_engine(engine, target.identity), **of_constitution(rules), "seed": call.seed,
                    "revisions": part.revisions, "sampling": sampling.to_json(), "direct": direct,
                    "few_shot": part.few_shot,
                }  # fmt: skip
                outcome = call.records(
                    target,
                    lambda: items,
                    make,
                    RevisionChain,
                    identity=identity,
                    seen=seen,
                    served=served,
                    noun="chains",
                )
        outcome.abstained = empty
        call.end(outcome, "chains")
