"""Response → critique → revision, one to N times, each step under a principle of the constitution.

Bai et al. 2022 (arXiv 2212.08073), section 3.1: the model answers, is asked to criticise its answer in the light
of one principle drawn at random, then to rewrite it; the rewritten answer takes the first one's place and the
step repeats. Each request is simply the next turn of the conversation.

Left out: carrying keys and values from one turn to the next (a matter of speed, not of method).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from solon.constitution import Constitution, Principle, draw_principles
from solon.engines.base import Completion, Engine, Failure, GenerationRequest, OnFailure, Sampling
from solon.records import Chat, Prompt, RevisionChain, RevisionStep, assistant, text_of, user

_NAMES = re.compile(r"\{(prompt|response|critique)\}")


def fill(template: str, **values: str) -> str:
    """Put values in place of `{prompt}`, `{response}` and `{critique}`; every other brace stays as it is.

    One pass: what a value contains is never substituted again.
    """
    return _NAMES.sub(lambda match: values.get(match[1], match[0]), template)


def critique_chat(prompt: Chat, response: str, principle: Principle, few_shot: int | None = 0) -> Chat:
    """The conversation that ends with the critique request."""
    request = fill(principle.critique, prompt=text_of(prompt), response=response)
    return (*examples_chat(principle, few_shot), *prompt, assistant(response), user(request))


def revision_chat(
    prompt: Chat, response: str, critique: str | None, principle: Principle, few_shot: int | None = 0
) -> Chat:
    """The conversation that ends with the revision request; without a critique the revision is direct."""
    request = fill(principle.revision, prompt=text_of(prompt), response=response, critique=critique or "")
    if critique is None:
        return (*examples_chat(principle, few_shot), *prompt, assistant(response), user(request))
    return (*critique_chat(prompt, response, principle, few_shot), assistant(critique), user(request))


def examples_chat(principle: Principle, few_shot: int | None) -> Chat:
    """The first `few_shot` of the principle's examples, or all of them, as earlier turns of the conversation."""
    turns: list[Any] = []
    for example in principle.examples[:few_shot]:
        values = {"prompt": example.prompt, "response": example.response, "critique": example.critique}
        turns += [
            user(example.prompt),
            assistant(example.response),
            user(fill(principle.critique, **values)),
            assistant(example.critique),
            user(fill(principle.revision, **values)),
            assistant(example.revision),
        ]
    return tuple(turns)


def revise(
    prompts: Sequence[Prompt],
    engine: Engine,
    constitution: Constitution,
    *,
    revisions: int = 2,
    sampling: Sampling,
    seed: int = 0,
    direct: bool = False,
    few_shot: int | None = 0,
    responder: Engine | None = None,
    meta: dict[str, Any] | None = None,
    failed: OnFailure | None = None,
) -> Iterator[RevisionChain]:
    """One chain a prompt, in the order of `prompts`.

    revisions: steps per chain, at least 1. direct: revise without a critique. few_shot: how many of a principle's
    examples to show; None: all. responder: writes the first response, where that is another model than the one that
    criticises. failed: called for each prompt that yields no chain because a completion failed, with the reason.
    """
    principles = {p.id: draw_principles(constitution, revisions, seed, p.id) for p in prompts}

    def ask(who: Engine, step: str, chats: dict[str, Chat]) -> dict[str, Completion]:
        requests = [GenerationRequest(f"{i}/{step}", chat, seed=seed) for i, chat in chats.items()]
        found = {}
        for c in who.generate(requests, sampling):
            name = c.id.rsplit("/", 1)[0]
            if c.error is None:
                found[name] = c
            elif failed:
                failed(Failure(name, c.error, c.again))
        return found

    first = ask(responder or engine, "response", {p.id: p.prompt for p in prompts})
    current = {i: c.text for i, c in first.items()}
    ended = {i: [c.ended] for i, c in first.items()}
    steps: dict[str, list[RevisionStep]] = {i: [] for i in current}
    by_id = {p.id: p for p in prompts}
    for n in range(revisions):
        critiques: dict[str, str | None] = {i: None for i in current}
        if not direct:
            asked = {i: critique_chat(by_id[i].prompt, text, principles[i][n], few_shot) for i, text in current.items()}
            critiques = {i: c.text for i, c in ask(engine, f"critique-{n}", asked).items()}
        asked = {
            i: revision_chat(by_id[i].prompt, current[i], critique, principles[i][n], few_shot)
            for i, critique in critiques.items()
        }
        revised = ask(engine, f"revision-{n}", asked)
        current = {i: c.text for i, c in revised.items()}
        for i, c in revised.items():
            steps[i].append(RevisionStep(principle=principles[i][n].id, critique=critiques[i] or "", revision=c.text))
            ended[i].append(c.ended)
    for prompt in prompts:
        if prompt.id in current:
            yield RevisionChain(
                id=prompt.id,
                prompt=prompt.prompt,
                response=first[prompt.id].text,
                steps=tuple(steps[prompt.id]),
                source=prompt.source,
                meta={**(meta or {}), "ended": ended[prompt.id]},  # response, then each revision
            )
