"""Comparisons: the judge compares each pair under principles, in both orders (Bai et al. 2022, section 4.1).

The sample of comparisons for people to check, and `solon label`, are here too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import combinations, islice
from typing import TYPE_CHECKING, Any

from solon.constitution import of_constitution
from solon.data import read_comparisons
from solon.data.readers import first_line, stream_pairs
from solon.engines import OnFailure, is_remote
from solon.feedback.questions import TEMPLATE_FINGERPRINT
from solon.feedback.settings import JudgeSettings
from solon.human import draw_validation_sample
from solon.publishing import write_json
from solon.records import Candidates, Comparison, Pair, fingerprint
from solon.runs.common import Common
from solon.runs.options import CONSTITUTION, MAX_CONNECTIONS, MODEL, OUT, PRINCIPLES, REQUIRED, Option, Verb
from solon.stages.artifacts import CHAINS, COMPARISONS, JUDGE, PAIRS
from solon.stages.base import Stage
from solon.stages.feedback_model import LabelSettings, asks_judge, judge_spec
from solon.stages.judging import judge_pairs, trust_in
from solon.stages.pairs import asked_prompts, response_tokens
from solon.stages.plan import Plan
from solon.tables import Section, number, text
from solon.terminal import note

if TYPE_CHECKING:
    from solon.feedback.judge import Judge
    from solon.runs.call import Call
    from solon.runs.run import Run


class Comparisons(Stage):
    name = "comparisons"
    part, settings = "feedback", JudgeSettings
    needs, uses, makes = (PAIRS, JUDGE), (CHAINS,), (COMPARISONS,)

    def runs(self, recipe: Common) -> bool:
        return asks_judge(recipe) and not recipe.of(LabelSettings).direct

    def estimate(self, plan: Plan) -> None:
        n = len(asked_prompts(plan.recipe, plan.data.prompts))
        plan.add(self.name, n, questions=[plan.comparing(judge_spec(plan.recipe), n, response_tokens(plan.recipe))])

    def run(self, run: Run) -> None:
        pairs = run.get(PAIRS)
        differing = [p for p in pairs if p.responses[0].strip() != p.responses[1].strip()]
        equal = len(pairs) - len(differing)
        left_out = {"the two responses are the same": equal} if equal else {}
        run.put(COMPARISONS, judge_pairs(run, run.get(JUDGE), self.name, differing, left_out=left_out))

    def gather(self, run: Run) -> dict[str, Any]:
        comparisons = run.get(COMPARISONS)
        trust = {"trust": {"labels": trust_in(comparisons, run.get(JUDGE))}} if comparisons else {}
        return {**trust, "principles": by_principle(run)}

    def sections(self, data: dict[str, Any]) -> list[Section]:
        rows = tuple(
            (
                text(p.get("id")),
                number(p.get("revisions")),
                number(p.get("comparisons")),
                number(p.get("mean_label"), 3),
            )
            for p in data.get("principles") or []
        )
        note = (
            "Mean label: P(the response that was sampled first is better). Which of two samples comes "
            "first is chance, so over many comparisons it is about 0.5."
        )
        return [Section("Principles", note, ("principle", "revisions", "comparisons", "mean label"), rows)]


def by_principle(run: Run) -> list[dict[str, Any]]:
    """For each principle: the revisions and the comparisons under it, and the mean P(the first response is better)."""
    revised = Counter(step.principle for chain in run.find(CHAINS) or [] for step in chain.steps)
    labels: dict[str, list[float]] = {}
    for comparison in run.find(COMPARISONS) or []:
        for judgement in comparison.judgements_of_first:
            if judgement.forward is not None and judgement.swapped is not None:
                labels.setdefault(judgement.principle, []).append((judgement.forward + judgement.swapped) / 2)
    ids = [p.id for p in run.constitution.principles]
    return [
        {
            "id": name,
            "revisions": revised[name],
            "comparisons": len(labels.get(name, [])),
            "mean_label": sum(labels[name]) / len(labels[name]) if name in labels else None,
        }
        for name in [*ids, *sorted(set(labels) - set(ids))]
    ]


class Validation(Stage):
    """A blind sample of the judge's comparisons for people to check: validation/sample.jsonl."""

    name = "validation"
    uses = (COMPARISONS,)

    def runs(self, recipe: Common) -> bool:
        return recipe.human.validation_sample > 0

    def run(self, run: Run) -> None:
        n, seed = run.recipe.human.validation_sample, run.recipe.seed
        draw_validation_sample(run.dir / self.name, run.find(COMPARISONS) or [], n, seed)


class Label(Verb):
    """AI preference labels for given pairs, in both orders, with soft labels, and how far to trust the judge.

    Example: `solon label --pairs pairs.jsonl --constitution simple --out comparisons.jsonl`
    """

    name = "label"
    takes = (
        Option("pairs", str, REQUIRED, "Pairs of responses: a file of Solon's, in TRL's preference form or in HH form."),
        OUT, CONSTITUTION, MODEL, MAX_CONNECTIONS, PRINCIPLES,
        Option("hard", bool, False, "Labels are 1 or 0, and 0.5 where the two orders contradict each other."),
        Option("examples", str | None, None, "A file of labelled comparisons; the judge is shown the first ones as examples."),
        Option("few_shot", int, 4, "Number of these examples before each question.", 0),
        Option("tournament", bool, False, "Compare more than two responses in a knock-out instead of in all pairs."),
    )  # fmt: skip
    settings = (JudgeSettings,)
    hidden = ("question", "principles_per_pair", "soft_labels", "rationale_sampling", "scale",
              "max_tokens", "temperature", "top_p", "repetition_penalty")  # fmt: skip

    def run(self, call: Call) -> None:
        from solon.feedback.checks import require_runnable
        from solon.feedback.judges import open_judge

        settings = call.of(
            JudgeSettings,
            principles_per_pair=call["principles"],
            soft_labels=not call["hard"],
            few_shot=call["few_shot"] if call["examples"] else 0,
        )
        require_runnable(call.constitution.principles)
        labelled = read_comparisons(call["examples"]) if call["examples"] else []
        with call.engine() as engine:
            judge = open_judge(
                engine, call.constitution, settings, labelled, seed=call.seed,
                meta=lambda: call.meta(engine, template=TEMPLATE_FINGERPRINT),
            )  # fmt: skip
            label_file(call, judge)


def label_file(call: Call, judge: Judge) -> None:
    """Write the comparisons of a file's pairs to --out, and how far the judge can be trusted to OUT.trust.json.

    A prompt with more than two responses becomes comparisons of all pairs of its responses, on one scale.
    """
    from solon.engines.identity import of_engine
    from solon.feedback.ranking import Scheme, preferences
    from solon.feedback.trust import Trust

    trust, abstained, aside = Trust(judge=judge.name), Counter[str](), call.out.with_suffix(".trust.json")
    scheme: Scheme = "tournament" if call["tournament"] else "all"
    source = stream_pairs(call["pairs"])

    def ids_of(item: Pair | Candidates) -> list[str]:
        if isinstance(item, Pair):
            return [item.id]
        return [f"{item.id}/{i}-{j}" for i, j in combinations(range(len(item.responses)), 2)]

    def make(batch: Sequence[Pair | Candidates], failed: OnFailure) -> Iterator[Comparison]:
        yield from judge.compare([item for item in batch if isinstance(item, Pair)], failed=failed)
        candidates = [item for item in batch if isinstance(item, Candidates)]
        for ranking in judge.rank(candidates, scheme=scheme, failed=failed):
            yield from preferences(ranking)

    def seen(record: Comparison) -> None:
        trust.add(record)
        if record.abstained:
            why = next((j.abstained for j in record.judgements if j.abstained), None)
            abstained[why or "the judge said nothing of one of the two"] += 1

    engine = judge.engine
    with call.file([call["pairs"], engine.name], [aside]) as target:
        first_line(call["pairs"])  # a missing file is an error before anything is timed for `dtype: auto`
        identity = {
            **of_engine(engine, target.identity), **of_constitution(judge.constitution), "seed": judge.seed,
            "scheme": scheme, "judging": judge.settings.model_dump(mode="json"), "template": TEMPLATE_FINGERPRINT,
            "examples": fingerprint("examples", [asdict(e) for e in getattr(judge, "examples", ())]),
        }  # fmt: skip
        outcome = call.records(
            target, lambda: islice(source, call.limit), make, Comparison, identity=identity, ids_of=ids_of, seen=seen,
            served=is_remote(engine.name), noun="comparisons",
        )  # fmt: skip
        outcome.abstained = abstained
        summary = trust.summary()
        write_json(aside, summary)
    if source.repeated:
        note(f"{call['pairs']}: {source.repeated} of its records stand there more than once and are taken once")
    for finding in summary["findings"]:
        call.tell(finding)
    more = {"repeated": source.repeated, "trust": str(aside), "findings": summary["findings"], "summary": summary}
    call.end(outcome, "comparisons", more)
