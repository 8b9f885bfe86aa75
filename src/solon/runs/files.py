"""Stages on their own, from file to file: the same journal and progress as in a run, without the run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import combinations, islice
from pathlib import Path
from typing import Any, TypeVar

from solon.constitution import Constitution
from solon.constitution.identity import of_constitution
from solon.data import read_demonstrations, read_pairs, read_prompts
from solon.data.readers import first_line, stream_pairs
from solon.engines import Failure, LazyEngine, OnFailure, Sampling, is_remote
from solon.engines.base import Engine
from solon.engines.identity import decided_dtype, of_engine, of_model
from solon.errors import InputError, printable
from solon.feedback.judge import ModelJudge
from solon.feedback.labels import as_pairs
from solon.feedback.principles import own_principles
from solon.feedback.questions import HHH, TEMPLATE_FINGERPRINT
from solon.feedback.ranking import Scheme, preferences
from solon.feedback.trust import Trust
from solon.identity import of_input
from solon.publishing import File, Identity, file, write_json
from solon.records import (
    Candidates,
    Chat,
    Comparison,
    Pair,
    Prompt,
    Record,
    RevisionChain,
    SFTExample,
    assistant,
    fingerprint,
)
from solon.reinforcement.reward_model import RewardModel
from solon.runs.journal import Journal, as_record, read_journal
from solon.runs.progress import progress_line
from solon.supervised.critique_revision import revise
from solon.terminal import Console, note

R = TypeVar("R", bound=Record)
BATCH = 64  # records worked on together
ANEW = "give another --out, or --restart to begin anew (the records are kept as NAME.old)"


@dataclass
class Outcome:
    """What became of a verb's items."""

    records: int = 0  # in the file now, those of earlier starts included
    failures: dict[str, Failure] = field(default_factory=dict)  # by item, of those that no record was made of
    abstained: Counter[str] = field(default_factory=Counter)  # reasons of the records that hold no answer

    @property
    def reasons(self) -> dict[str, int]:
        """Why there is no answer, the commonest reason first, and of how many items."""
        found = self.abstained + Counter(f.reason for f in self.failures.values())
        return dict(found.most_common())

    @property
    def failed(self) -> int:
        return len(self.failures) + self.abstained.total()

    def summary(self) -> dict[str, Any]:
        return {"records": self.records, "failed": self.failed, "reasons": self.reasons}

    @property
    def open(self) -> int:
        """How many items a later start may still get an answer for: the model was out of reach."""
        return sum(f.again for f in self.failures.values())

    @property
    def nothing(self) -> bool:
        """Whether no item has an answer."""
        return self.records <= self.abstained.total()

    def line(self, out: Path, what: str) -> str:
        """The outcome in one line for a person."""
        if not self.failed:
            return f"{out}: {self.records} {what}"
        told = "; ".join(f"{printable(reason, 160)} ({n})" for reason, n in list(self.reasons.items())[:3])
        more = f"; {len(self.reasons) - 3} other reasons" if len(self.reasons) > 3 else ""
        return f"{out}: {self.records} {what}; without an answer {self.failed}: {told}{more}"


def to_file(
    target: File,
    items: Callable[[], Iterable[Any]],
    make: Callable[[Sequence[Any], OnFailure], Iterable[R]],
    kind: type[R],
    *,
    identity: Identity,
    restart: bool = False,
    made_of: Callable[[Any], Sequence[str]] = lambda item: [item.id],
    seen: Callable[[R], None] = lambda record: None,
    batch_size: int = BATCH,
    served: bool = False,
    quiet: bool,
    what: str,
) -> Outcome:
    """Turn items into records in a file. Run again on the same file, it goes on where it stopped.

    Memory does not grow with the records but for their ids. items: reads the items from their source, and is called
    twice: once to see that all of them can be read, and that no id stands twice, before the first is worked on.
    made_of: the ids of the records an item becomes. seen: called with each record in the file, those of an earlier
    start first. identity: of everything but the items; a record's `meta.input` is the fingerprint of its own item. served: a
    server answers, and is asked for what is missing alone; with a model in this process a batch is made again as a
    whole, since rounding depends on what shares it.

    Raises InputError where the file holds records of another identity, or of items that are not the same any more.
    """
    known: dict[str, str] = {}
    for item in items():
        content = of_input(item)
        for name in made_of(item):
            if name in known:
                raise InputError(f'the id "{name}" (or the very same record) stands twice; make ids unique')
            known[name] = content
    if not known:
        raise InputError("no records to work on; one JSON object a line")
    if target.claim(identity, restart=restart):
        for place, row in read_journal(target.path):
            _check_input(place, row, known)
            seen(as_record(place, row, kind))
    outcome = Outcome()

    answered: set[str] = set()

    def fail(failure: Failure) -> None:
        if failure.id not in answered:  # a batch is asked again as a whole
            outcome.failures[failure.id] = failure

    with (
        Journal(target.path, keep=False) as journal,
        progress_line(Console(stderr=True, quiet=quiet), target.out.name, len(known), what) as advance,
    ):
        advance(len(journal.ids), {})
        answered = journal.ids
        left = iter(items())
        while batch := list(islice(left, batch_size)):
            missing = [item for item in batch if any(name not in journal.ids for name in made_of(item))]
            if not missing:
                continue
            if served:
                batch = missing
            for made in make(batch, fail):
                meta = {**made.meta, "input": known[made.id]}  # type: ignore[attr-defined]
                record = made.model_copy(update={"meta": meta})
                if journal.append(record.to_json()):
                    advance(1, {})
                    seen(record)
        outcome.records = len(journal.ids)
        return outcome


def _check_input(place: str, row: dict[str, Any], known: Mapping[str, str]) -> None:
    name, meta = row["id"], row.get("meta")
    if name not in known:
        raise InputError(f'{place}: a record of another input ("{printable(name, 80)}"); {ANEW}')
    if not isinstance(meta, dict) or meta.get("input") != known[name]:
        raise InputError(f'{place}: was made of another text than "{printable(name, 80)}" has now; {ANEW}')


def measure_judge(
    model: str, comparisons: Sequence[Comparison], constitution: Constitution, *, system: str | None, dtype: str
) -> dict[str, Any]:
    """How far a judge can be trusted, on comparisons that people labelled, each under its own principle.

    other_principles: of these, asked the general question, as the constitution has no principle that says the same.
    """
    trust = Trust()
    asked, others = own_principles(comparisons, constitution, HHH)
    with LazyEngine(model, system=system, dtype=dtype) as engine:
        for judged in ModelJudge(engine, constitution).compare(as_pairs(comparisons, 0), asked=asked):
            trust.add(judged)
    return {**trust.summary(), "other_principles": others}


def critique_file(
    prompts: str,
    out: Path,
    engine: Engine,
    constitution: Constitution,
    *,
    revisions: int,
    sampling: Sampling,
    direct: bool = False,
    few_shot: int | None = None,
    seed: int = 0,
    meta: Callable[[], dict[str, Any]] = dict,
    limit: int | None = None,
    restart: bool = False,
    quiet: bool = False,
) -> Outcome:
    """Revision chains of a file's prompts in `out`."""
    empty: Counter[str] = Counter()

    def make(batch: Sequence[Prompt], failed: OnFailure) -> Iterator[RevisionChain]:
        return revise(
            batch, engine, constitution, revisions=revisions, sampling=sampling, seed=seed, direct=direct,
            few_shot=few_shot, meta=meta(), failed=failed,
        )  # fmt: skip

    def seen(chain: RevisionChain) -> None:
        if not any(text.strip() for text in (chain.response, *(s.revision for s in chain.steps))):
            empty["the model's answers are empty"] += 1

    with file(out, [prompts, engine.name]) as target:
        items = read_prompts(prompts)[:limit]
        identity = {
            **of_engine(engine, target.identity), **of_constitution(constitution), "seed": seed,
            "revisions": revisions, "sampling": sampling.to_json(), "direct": direct, "few_shot": few_shot,
        }  # fmt: skip
        outcome = to_file(
            target, lambda: items, make, RevisionChain, identity=identity, restart=restart, seen=seen,
            served=is_remote(engine.name), quiet=quiet, what="chains",
        )  # fmt: skip
    outcome.abstained = empty
    return outcome


def label_file(
    pairs: str,
    out: Path,
    judge: ModelJudge,
    *,
    scheme: Scheme = "all",
    limit: int | None = None,
    restart: bool = False,
    quiet: bool = False,
) -> dict[str, Any]:
    """Comparisons of a file's pairs in `out`, and how far the judge can be trusted beside it, in OUT.trust.json.

    A prompt with more than two responses becomes comparisons of all its pairs, on one scale.
    """
    trust, abstained, aside = Trust(judge=judge.name), Counter[str](), out.with_suffix(".trust.json")
    source = stream_pairs(pairs)

    def items() -> Iterator[Pair | Candidates]:
        return islice(source, limit)

    def made_of(item: Pair | Candidates) -> list[str]:
        if isinstance(item, Pair):
            return [item.id]
        return [f"{item.id}/{i}-{j}" for i, j in combinations(range(len(item.responses)), 2)]

    def make(batch: Sequence[Pair | Candidates], failed: OnFailure) -> Iterator[Comparison]:
        two = [item for item in batch if isinstance(item, Pair)]
        more = [item for item in batch if isinstance(item, Candidates)]
        yield from judge.compare(two, failed=failed)
        for ranking in judge.rank(more, scheme=scheme, failed=failed):
            yield from preferences(ranking)

    def seen(record: Comparison) -> None:
        trust.add(record)
        if record.abstained:
            why = next((j.abstained for j in record.judgements if j.abstained), None)
            abstained[why or "the judge said nothing of one of the two"] += 1

    engine = judge.engine
    with file(out, [pairs, engine.name], [aside]) as target:
        first_line(pairs)  # a file that is not there is said before anything is timed for `dtype: auto`
        identity = {
            **of_engine(engine, target.identity), **of_constitution(judge.constitution), "seed": judge.seed,
            "scheme": scheme, "judging": judge.settings.model_dump(mode="json"), "template": TEMPLATE_FINGERPRINT,
            "examples": fingerprint("examples", [asdict(e) for e in judge.examples]),
        }  # fmt: skip
        outcome = to_file(
            target, items, make, Comparison, identity=identity, restart=restart, made_of=made_of, seen=seen,
            served=is_remote(engine.name), quiet=quiet, what="comparisons",
        )  # fmt: skip
        outcome.abstained = abstained
        summary = trust.summary()
        write_json(aside, summary)
    if source.repeated:
        note(f"{pairs}: {source.repeated} of its records stand there more than once and are taken once")
    return {
        "out": str(out), **outcome.summary(), "repeated": source.repeated, "trust": str(aside), "findings": summary["findings"],
        "summary": summary, "outcome": outcome,
    }  # fmt: skip


class ScoredExample(SFTExample):
    score: float  # in standard deviations of the reward model's reference


class ScoredPair(Pair):
    scores: tuple[float, float]  # of the two responses


def score_file(
    reward_model: str,
    name: str,
    out: Path,
    *,
    dtype: str = "auto",
    limit: int | None = None,
    restart: bool = False,
    quiet: bool = False,
) -> Outcome:
    """Scores for a file of conversations (`score`), or of pairs and comparisons (`scores`, one a side).

    What the reward model cannot read (a text beyond its context) has no score, and is counted as failed.
    """
    loaded: list[RewardModel] = []

    def make(batch: Sequence[Any], failed: OnFailure) -> Iterator[ScoredExample | ScoredPair]:
        if not loaded:
            loaded.append(RewardModel.load(reward_model, used["dtype"]))
        chats: list[Chat] = []
        readable: list[Any] = []
        for item in batch:
            own = [(*item.prompt, assistant(text)) for text in item.responses] if sided else [item.messages]
            why = next(filter(None, map(loaded[0].unfit, own)), None)
            if why:
                failed(Failure(item.id, why))
            else:
                readable.append(item)
                chats += own
        scores = loaded[0].score(chats)
        for n, item in enumerate(readable):
            if sided:
                yield ScoredPair(**dict(item), scores=(scores[2 * n], scores[2 * n + 1]))
            else:
                yield ScoredExample(**dict(item), score=scores[n])

    with file(out, [reward_model, name]) as target:
        sided = any(key in first_line(name) for key in ("chosen", "responses"))
        items: list[Any] = (read_pairs(name) if sided else read_demonstrations(name))[:limit]
        used = {"dtype": decided_dtype(dtype, target.identity, reward_model)}
        identity = {"reward_model": of_model(reward_model), **used}
        kind: Any = ScoredPair if sided else ScoredExample
        outcome = to_file(
            target, lambda: items, make, kind, identity=identity, restart=restart, batch_size=256, quiet=quiet,
            what="scores",
        )  # fmt: skip
    return outcome
