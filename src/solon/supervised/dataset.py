"""From demonstrations and revision chains to SFT examples."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

from solon.constitution import Constitution
from solon.records import RevisionChain, SFTExample, assistant, user
from solon.supervised.critique_revision import fill


def from_chains(
    chains: Iterable[RevisionChain], use: Literal["final", "all"] = "final"
) -> tuple[list[SFTExample], int]:
    """Examples that teach the revisions as answers, and how many revisions were left out.

    use: the last revision of a chain, or all of them (Bai et al. 2022 trained on all; section 3.2). Left out are
    empty revisions and those cut at the token limit: they would teach the model not to stop.
    """
    examples, left_out = [], 0
    for chain in chains:
        ended = chain.meta.get("ended") or [True] * (1 + len(chain.steps))
        numbered = list(enumerate(chain.steps, start=1))
        for n, step in numbered if use == "all" else numbered[-1:]:
            if not step.revision.strip() or not ended[n]:
                left_out += 1
                continue
            examples.append(
                SFTExample(
                    id=f"{chain.id}/{n}",
                    messages=(*chain.prompt, assistant(step.revision)),
                    source=chain.source,
                    meta={"principles": [s.principle for s in chain.steps[:n]], **chain.meta},
                )
            )
    return examples, left_out


def from_demonstrated_revisions(chains: Iterable[RevisionChain], constitution: Constitution) -> list[SFTExample]:
    """Examples that teach how to criticise and revise, in the very turns `revise` asks for.

    A step under a principle that this constitution does not have is left out: there are no words to ask it in.
    """
    known = {p.id: p for p in constitution.principles}
    examples = []
    for chain in chains:
        answer = chain.response
        for n, step in enumerate(chain.steps, start=1):
            principle = known.get(step.principle)
            if principle is not None:
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
    return examples


def mix(revised: Sequence[SFTExample], kept: Sequence[SFTExample], share: float) -> list[SFTExample]:
    """`revised`, and so many of `kept` that they make up `share` (0..1) of the whole, so that nothing is forgotten."""
    if not 0 <= share < 1:
        raise ValueError("share must be in [0, 1)")
    n = round(len(revised) * share / (1 - share))
    return [*revised, *list(kept)[:n]]
