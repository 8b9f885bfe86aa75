"""From demonstrations and revision chains to SFT examples."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Literal

from solon.constitution import Constitution
from solon.measures.statistics import preference
from solon.records import Comparison, Pair, RevisionChain, SFTExample, assistant, user
from solon.supervised.critique_revision import fill

# Why a text of a chain is not learned.
NO_REVISION, EMPTY, CUT = "no revision", "empty revision", "cut at the token limit"
UNKNOWN_PRINCIPLE = "step under a principle that the constitution does not have"


def from_chains(
    chains: Iterable[RevisionChain], use: Literal["final", "all"] = "final"
) -> tuple[list[SFTExample], dict[str, int]]:
    """Examples that teach the revisions as answers, and how many revisions were left out, by reason.

    use: the last revision of a chain, or all of them (Bai et al. 2022 trained on all; section 3.2). Left out are
    empty revisions and those cut at the token limit: they would teach the model not to stop.
    """
    examples: list[SFTExample] = []
    left_out: Counter[str] = Counter()
    for chain in chains:
        numbered = range(1, len(chain.steps) + 1)
        for n in (numbered if use == "all" else numbered[-1:]) or [0]:
            if reason := why_not(chain, n) if n else NO_REVISION:
                left_out[reason] += 1
            else:
                examples.append(to_example(chain, n))
    return examples, dict(left_out)


def why_not(chain: RevisionChain, n: int) -> str | None:
    """Why text n of the chain (0: the response, then each revision) teaches nothing; None where it is whole."""
    if not chain_text(chain, n).strip():
        return EMPTY
    ended = chain.meta.get("ended") or []  # nothing is said of texts that were not sampled here
    return CUT if n < len(ended) and not ended[n] else None


def is_whole(chain: RevisionChain, n: int) -> bool:
    """Whether text n of the chain (0: the response, then each revision) is not empty and ended by itself."""
    return why_not(chain, n) is None


def chain_text(chain: RevisionChain, n: int) -> str:
    """Text n of the chain: 0 is the response, then each revision."""
    return chain.steps[n - 1].revision if n else chain.response


def to_example(chain: RevisionChain, n: int) -> SFTExample:
    """Teach text n of the chain as the answer; the principles that shaped it are those of its first n steps."""
    return SFTExample(
        id=f"{chain.id}/{n}",
        messages=(*chain.prompt, assistant(chain_text(chain, n))),
        source=chain.source,
        meta={"principles": [s.principle for s in chain.steps[:n]], **chain.meta},
    )


def contests(chains: Iterable[RevisionChain]) -> list[Pair]:
    """What a judge is to choose between in each chain: (last revision, response), where both are whole and differ."""
    return [
        Pair(id=c.id, prompt=c.prompt, responses=(c.steps[-1].revision, c.response), source=c.source)
        for c in chains
        if is_whole(c, len(c.steps)) and is_whole(c, 0) and c.steps[-1].revision.strip() != c.response.strip()
    ]


def from_choices(
    chains: Sequence[RevisionChain], choices: Iterable[Comparison]
) -> tuple[list[SFTExample], dict[str, int]]:
    """Examples that teach what the judge preferred in each chain, and how many chains were left out, by reason.

    choices: of `contests(chains)`. A revision that the judge finds worse than what it revised is not learned; the
    paper learns every revision, which needs a model that revises well. Without a contest the whole one of the two is
    taken; on a tie or an abstention the revision, as in the paper.
    """
    preferred = {
        c.id: preference(c.p_first) for c in choices if c.p_first is not None
    }  # of the revision, which is first
    examples: list[SFTExample] = []
    left_out: Counter[str] = Counter()
    for chain in chains:
        last = len(chain.steps)
        whole = [n for n in (last, 0) if is_whole(chain, n)]
        if preferred.get(chain.id) == 0 and 0 in whole:
            whole = [0]
        if whole:
            examples.append(to_example(chain, whole[0]))
        else:
            left_out[(why_not(chain, last) if last else None) or NO_REVISION] += 1
    return examples, dict(left_out)


def from_demonstrated_revisions(
    chains: Iterable[RevisionChain], constitution: Constitution
) -> tuple[list[SFTExample], dict[str, int]]:
    """Examples that teach how to criticise and revise, in the very turns `revise` asks for; and what was left out.

    A step under a principle that this constitution does not have is left out: there are no words to ask it in.
    """
    known = {p.id: p for p in constitution.principles}
    examples: list[SFTExample] = []
    left_out: Counter[str] = Counter()
    for chain in chains:
        answer = chain.response
        for n, step in enumerate(chain.steps, start=1):
            principle = known.get(step.principle)
            if principle is None:
                left_out[UNKNOWN_PRINCIPLE] += 1
            else:
                values = {"prompt": chain.prompt[-1].content, "response": answer, "critique": step.critique}
                messages = (
                    *chain.prompt,
                    assistant(answer),
                    user(fill(principle.critique, **values)),
                    assistant(step.critique),
                    user(fill(principle.revision, **values)),
                    assistant(step.revision),
                )
                examples.append(
                    SFTExample(
                        id=f"{chain.id}/{n}",
                        messages=messages,
                        source=chain.source,
                        train_turns=(len(messages) - 3, len(messages) - 1),
                    )
                )
            answer = step.revision
    return examples, dict(left_out)


def mix(revised: Sequence[SFTExample], kept: Sequence[SFTExample], share: float) -> list[SFTExample]:
    """`revised`, and so many of `kept` that they make up `share` (0..1) of the whole, so that nothing is forgotten."""
    if not 0 <= share < 1:
        raise ValueError("share must be in [0, 1)")
    n = round(len(revised) * share / (1 - share))
    return [*revised, *list(kept)[:n]]
