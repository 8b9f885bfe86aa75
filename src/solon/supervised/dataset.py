"""SFT examples from revision chains and demonstrations."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Literal

from solon.constitution import Constitution
from solon.measures.statistics import preference
from solon.records import CUT_TO_SENTENCE, Chat, Comparison, Pair, RevisionChain, SFTExample, assistant, text_of
from solon.supervised.critique_revision import revision_turns

# Reasons for leaving a text of a chain out.
NO_REVISION, EMPTY, CUT = "no revision", "empty revision", "cut at the token limit"
UNDECIDED, SAME_PROMPT = "comparison without a better response", "another comparison of the same prompt"
UNKNOWN_PRINCIPLE = "step under a principle that the constitution does not have"
Examples = tuple[list[SFTExample], dict[str, int]]  # the examples; the number of texts left out, by reason


def from_chains(chains: Iterable[RevisionChain], use: Literal["final", "all"] = "final") -> Examples:
    """Examples that teach the revisions as answers, and the number of revisions left out, by reason.

    use: the last revision of a chain, or all revisions (Bai et al. 2022 trained on all; section 3.2). Empty revisions and
    revisions cut at the token limit are left out: they would teach the model not to stop.
    """
    results: list[SFTExample | str] = []
    for chain in chains:
        numbers = range(1, len(chain.steps) + 1)
        for n in (numbers if use == "all" else numbers[-1:]) or [0]:
            results.append((fault_of(chain, n) if n else NO_REVISION) or to_example(chain, n))
    return _separate(results)


def from_responses(chains: Iterable[RevisionChain]) -> Examples:
    """Examples that teach the responses of chains without steps, and the number of responses left out, by reason.

    These are the model's own answers to prompts that are not revised (Bai et al. 2022, section 3.2: helpful prompts). They keep
    the model as it is. A response that was cut at the token limit is learned up to the end of its last whole sentence, and
    its end is not learned.
    """
    results: list[SFTExample | str] = []
    for chain in chains:
        fault = fault_of(chain, 0)
        if fault == CUT and (whole := whole_sentences(chain.response)):
            meta = {**chain.meta, "ended": [True], CUT_TO_SENTENCE: True}
            chain, fault = chain.model_copy(update={"response": whole, "meta": meta}), None
        results.append(fault or to_example(chain, 0))
    return _separate(results)


_SENTENCE_END = re.compile(r"[.!?][\"')\]]*(?=\s)")
# Words whose full stop ends no sentence: the number of a list's item, and common abbreviations.
_NO_END = re.compile(
    r"(?:^|\s)(?:\d+|dr|mr|mrs|ms|st|fig|vs|approx|e\.g|i\.e|a\.m|p\.m|[a-z])\.[\"')\]]*$", re.IGNORECASE
)


def whole_sentences(text: str) -> str:
    """The text up to the end of its last whole sentence; empty where there is none."""
    ends = [m.end() for m in _SENTENCE_END.finditer(text.rstrip() + " ") if not _NO_END.search(text[: m.end()])]
    return text[: ends[-1]] if ends else ""


def _separate(results: Sequence[SFTExample | str]) -> Examples:
    """The examples among the results, and the number of each reason among them."""
    left_out = Counter(r for r in results if isinstance(r, str))
    return [r for r in results if isinstance(r, SFTExample)], dict(left_out)


def fault_of(chain: RevisionChain, n: int) -> str | None:
    """The reason why text n of the chain (0: the response, then each revision) teaches nothing; None: it is whole."""
    if not chain_text(chain, n).strip():
        return EMPTY
    ended = chain.meta.get("ended") or []  # a chain that people wrote has no such list
    return CUT if n < len(ended) and not ended[n] else None


def chain_text(chain: RevisionChain, n: int) -> str:
    """Text n of the chain: 0 is the response, then each revision."""
    return chain.steps[n - 1].revision if n else chain.response


def to_example(chain: RevisionChain, n: int) -> SFTExample:
    """An example that teaches text n of the chain as the answer. The principles of the first n steps shaped the text."""
    return SFTExample(
        id=f"{chain.id}/{n}",
        messages=(*chain.prompt, assistant(chain_text(chain, n))),
        source=chain.source,
        meta={"prompt_id": chain.id, "principles": [s.principle for s in chain.steps[:n]], **chain.meta},
    )


def contests(chains: Iterable[RevisionChain]) -> list[Pair]:
    """The pair of each chain that a judge decides: (last revision, response), where both are whole and differ."""
    return [
        Pair(id=c.id, prompt=c.prompt, responses=(c.steps[-1].revision, c.response), source=c.source)
        for c in chains
        if not fault_of(c, len(c.steps)) and not fault_of(c, 0) and c.steps[-1].revision.strip() != c.response.strip()
    ]


def from_choices(chains: Sequence[RevisionChain], choices: Iterable[Comparison]) -> Examples:
    """Examples that teach the text that the judge preferred in each chain, and the number of chains left out, by reason.

    choices: the comparisons of `contests(chains)`. A revision that the judge finds worse than the response is not
    learned. The paper learns every revision, which needs a model that revises well. If a chain has no contest, the whole
    text of the two is learned. On a tie or an abstention the revision is learned, as in the paper.
    """
    # the revision is the first text of each pair
    preferred = {c.id: preference(c.p_first) for c in choices if c.p_first is not None}
    results: list[SFTExample | str] = []
    for chain in chains:
        last = len(chain.steps)
        whole = [n for n in (last, 0) if not fault_of(chain, n)]
        if preferred.get(chain.id) == 0 and 0 in whole:
            whole = [0]
        fault = (fault_of(chain, last) if last else None) or NO_REVISION
        results.append(to_example(chain, whole[0]) if whole else fault)
    return _separate(results)


def from_demonstrated_revisions(chains: Iterable[RevisionChain], constitution: Constitution) -> Examples:
    """Examples that teach critique and revision in the turns of `revise`, and the number of steps left out, by reason.

    A step under a principle that the constitution does not have is left out, because the principle's request is unknown.
    """
    known = {p.id: p for p in constitution.principles}
    results: list[SFTExample | str] = []
    for chain in chains:
        answer = chain.response
        for n, step in enumerate(chain.steps, start=1):
            if principle := known.get(step.principle):
                turns = revision_turns(principle, text_of(chain.prompt), answer, step.critique, step.revision)
                messages = (*chain.prompt, *turns)
                example = SFTExample(
                    id=f"{chain.id}/{n}",
                    messages=messages,
                    source=chain.source,
                    train_turns=(len(messages) - 3, len(messages) - 1),
                    meta={"prompt_id": chain.id, "principles": [step.principle]},
                )
            results.append(example if principle else UNKNOWN_PRINCIPLE)
            answer = step.revision
    return _separate(results)


def from_preferred(comparisons: Iterable[Comparison]) -> Examples:
    """Examples that teach the response that is better, one for each prompt, and the number of comparisons left out, by reason."""
    results: list[SFTExample | str] = []
    seen: set[Chat] = set()
    for c in comparisons:
        if not (sides := c.better_and_worse):
            results.append(UNDECIDED)
        elif c.prompt in seen:
            results.append(SAME_PROMPT)
        else:
            seen.add(c.prompt)
            results.append(
                SFTExample(id=c.id, messages=(*c.prompt, *sides[0]), source=c.source, meta={"preferred": True})
            )
    return _separate(results)


def mix(revised: Sequence[SFTExample], demonstrations: Sequence[SFTExample], share: float) -> list[SFTExample]:
    """`revised`, then the first demonstrations, up to `share` (0..1) of the whole set. They keep older abilities alive."""
    if not 0 <= share < 1:
        raise ValueError("share must be in [0, 1)")
    n = round(len(revised) * share / (1 - share))
    return [*revised, *demonstrations[:n]]
