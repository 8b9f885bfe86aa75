"""Revisions: response → critique → revision, one to five times (Bai et al. 2022, section 3.1), and `solon critique`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from solon.constitution import of_constitution
from solon.data import read_prompts
from solon.engines import OnFailure, is_remote
from solon.engines.sampling import SamplingSettings
from solon.records import Prompt, RevisionChain, Source
from solon.runs.options import CONSTITUTION, MAX_CONNECTIONS, MODEL, OUT, REQUIRED, Option, Verb
from solon.settings import Settings, Tokens
from solon.stages.artifacts import CHAINS, DATA, START_MODEL, WARM_MODEL
from solon.stages.base import Stage
from solon.stages.plan import FILLED, Plan
from solon.supervised.critique_revision import revise

if TYPE_CHECKING:
    from solon.runs.call import Call
    from solon.runs.run import Run


class RevisionSampling(SamplingSettings):
    """Sampling of revision chains: greedy, because a small model's critiques and revisions lose their sense at temperature 0.5."""

    max_tokens: Tokens = 96
    """Largest number of tokens of a response, a critique or a revision; a longer text is cut there."""
    temperature: float = Field(0.0, ge=0)
    """Temperature of sampling; 0: always the most probable token."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Sample only among the most probable tokens that together have this probability; 1: among all tokens."""
    repetition_penalty: float = Field(1.05, gt=0)
    """Penalty on tokens that the text or its prompt already contains; 1: none. Many servers do not have it."""


class RevisionSettings(Settings):
    """Critiques and revisions that the model writes."""

    revisions: int = Field(2, ge=1, le=5)
    """Number of critique-and-revision steps, each under a principle drawn by its weight."""
    revise: Literal["all", "red_team"] = "all"
    """The prompts whose responses are criticised and revised. red_team: of helpful prompts SL-CAI learns the response itself, as
    in the paper (section 3.2); with `responder: start` that is an answer of the model before any training."""
    critique: bool = True
    """Write a critique before each revision; false: revise without a critique."""
    few_shot: int | None = Field(None, ge=0)
    """Number of a principle's examples that are shown before each request; null: all of them."""
    responder: Literal["self", "start"] = "self"
    """The model that writes the first response: self is the model that criticises, start is the start model."""
    sampling: RevisionSampling = RevisionSampling()
    """Sampling of responses, critiques and revisions."""

    @property
    def only(self) -> Source | None:
        """The source of the prompts that are revised; None: prompts of every source."""
        return "red_team" if self.revise == "red_team" else None


class Revisions(Stage):
    name = "revisions"
    part, settings, optional = "supervised", RevisionSettings, True
    needs, uses, makes = (DATA, START_MODEL), (WARM_MODEL,), (CHAINS,)

    def estimate(self, plan: Plan) -> None:
        part, n = plan.recipe.of(RevisionSettings), len(plan.data.prompts)
        text = part.sampling.max_tokens * FILLED
        steps = part.revisions * sum(part.only in (None, p.source) for p in plan.data.prompts)
        step = plan.prompt + text + plan.request + (plan.prompt + 2 * text + 2 * plan.request)
        written = n * text + steps * text * (2 if part.critique else 1)
        plan.add(self.name, n, read=n * plan.prompt + steps * step, written=written)

    def run(self, run: Run) -> None:
        part = run.recipe.of(RevisionSettings)
        with run.engine(run.get(WARM_MODEL, START_MODEL)) as engine, run.engine(run.get(START_MODEL)) as start:

            def make(batch: Sequence[Prompt]) -> Iterator[RevisionChain]:
                return revise(
                    batch, engine, run.constitution, revisions=part.revisions, sampling=part.sampling.sampling(),
                    seed=run.recipe.seed, direct=not part.critique, few_shot=part.few_shot,
                    responder=start if part.responder == "start" else None, only=part.only,
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
        Option("prompts", str, REQUIRED, "A file of prompts (.jsonl), or a shipped set such as solon:red-team."),
        OUT, CONSTITUTION, MODEL, MAX_CONNECTIONS,
        Option("direct", bool, False, "Revise without a critique."),
        Option("repetition_penalty", float | None, None, "Penalty on repeated tokens; where none is given, 1.05, and 1 (no penalty) for a server.", 0.01),
    )  # fmt: skip
    settings = (RevisionSettings,)
    hidden = ("critique", "responder", "revise")

    def run(self, call: Call) -> None:
        from solon.engines.identity import of_engine

        constitution, part, direct = call.constitution, call.of(RevisionSettings), call["direct"]
        served = is_remote(call["model"])
        penalty = call["repetition_penalty"] or (1.0 if served else RevisionSampling().repetition_penalty)
        sampling = part.sampling.model_copy(update={"repetition_penalty": penalty}).sampling()
        empty: Counter[str] = Counter()
        with call.engine() as engine:

            def make(batch: Sequence[Prompt], failed: OnFailure) -> Iterator[RevisionChain]:
                return revise(
                    batch, engine, constitution, revisions=part.revisions, sampling=sampling, seed=call.seed, direct=direct,
                    few_shot=part.few_shot, meta=call.meta(engine, sampling=sampling.to_json()), failed=failed,
                )  # fmt: skip

            def seen(chain: RevisionChain) -> None:
                if not any(text.strip() for text in (chain.response, *(s.revision for s in chain.steps))):
                    empty["the model's answers are empty"] += 1

            with call.file([call["prompts"], call["model"]]) as target:
                items = read_prompts(call["prompts"])[: call.limit]
                identity = {
                    **of_engine(engine, target.identity), **of_constitution(constitution), "seed": call.seed,
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
