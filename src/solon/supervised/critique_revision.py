"""Critique and revision: response → critique → revision, one to N times. Each step applies a principle of the constitution.

Bai et al. 2022 (arXiv 2212.08073), section 3.1: the model answers, criticises the answer under one principle drawn at random,
and rewrites the answer. The rewritten answer replaces the first answer, and the step repeats. Each request is the next turn of
the conversation. Keys and values of one turn are not reused for the next turn, which would change the speed only.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from solon.constitution import Constitution, Principle, draw_principles
from solon.engines.base import Completion, Engine, Failure, GenerationRequest, OnFailure, Sampling
from solon.records import Chat, Message, Prompt, RevisionChain, RevisionStep, Source, assistant, text_of, user

_NAMES = re.compile(r"\{(prompt|response|critique)\}")


def fill(template: str, **values: str) -> str:
    """The template with `{prompt}`, `{response}` and `{critique}` replaced by the values. Other braces stay.

    The text is read once, so a name in braces inside a value stays as it is.
    """
    return _NAMES.sub(lambda match: values.get(match[1], match[0]), template)


def critique_chat(prompt: Chat, response: str, principle: Principle, few_shot: int | None = 0) -> Chat:
    """The conversation that ends with the critique request."""
    request = fill(principle.critique, prompt=text_of(prompt), response=response)
    return (*with_examples(prompt, principle, few_shot), assistant(response), user(request))


def revision_chat(
    prompt: Chat, response: str, critique: str | None, principle: Principle, few_shot: int | None = 0
) -> Chat:
    """The conversation that ends with the revision request. Without a critique the revision is direct."""
    request = fill(principle.revision, prompt=text_of(prompt), response=response, critique=critique or "")
    if critique is None:
        return (*with_examples(prompt, principle, few_shot), assistant(response), user(request))
    return (*critique_chat(prompt, response, principle, few_shot), assistant(critique), user(request))


def with_examples(prompt: Chat, principle: Principle, few_shot: int | None) -> Chat:
    """The prompt with the first `few_shot` examples of the principle (None: all examples) as earlier turns.

    The prompt's own system message stays first: chat templates take a system message at the beginning only.
    """
    start = 1 if prompt[0].role == "system" else 0
    turns: list[Message] = [*prompt[:start]]
    for e in principle.examples[:few_shot]:
        turns += [user(e.prompt), *revision_turns(principle, e.prompt, e.response, e.critique, e.revision)]
    return (*turns, *prompt[start:])


def revision_turns(principle: Principle, prompt: str, response: str, critique: str, revision: str) -> Chat:
    """The turns of one step that is complete: response, critique request, critique, revision request, revision."""
    values = {"prompt": prompt, "response": response, "critique": critique}
    asked_critique, asked_revision = fill(principle.critique, **values), fill(principle.revision, **values)
    return (assistant(response), user(asked_critique), assistant(critique), user(asked_revision), assistant(revision))


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
    only: Source | None = None,
    meta: dict[str, Any] | None = None,
    failed: OnFailure | None = None,
) -> Iterator[RevisionChain]:
    """One chain per prompt, in the order of `prompts`.

    revisions: steps per chain, at least 1. direct: revise without a critique. few_shot: the number of a principle's
    examples to show; None: all. responder: the model that writes the first response, if it is not `engine`. only: the
    source of the prompts whose responses are revised; the chains of other prompts have no steps (None: all are revised).
    failed: called with the reason for each prompt that yields no chain because a completion failed.
    """

    def complete(model: Engine, step: str, chats: dict[str, Chat]) -> dict[str, Completion]:
        return _complete(model, step, chats, sampling, seed, failed)

    principles = {p.id: draw_principles(constitution, revisions, seed, p.id) for p in prompts}
    first = complete(responder or engine, "response", {p.id: p.prompt for p in prompts})
    ended = {i: [c.ended] for i, c in first.items()}
    steps: dict[str, list[RevisionStep]] = {i: [] for i in first}
    by_id = {p.id: p.prompt for p in prompts}
    revised_ids = {p.id for p in prompts if only in (None, p.source)}
    current = {i: c.text for i, c in first.items() if i in revised_ids}
    for n in range(revisions):
        critiques: dict[str, str | None] = dict.fromkeys(current)
        if not direct:
            chats = {i: critique_chat(by_id[i], text, principles[i][n], few_shot) for i, text in current.items()}
            critiques = {i: c.text for i, c in complete(engine, f"critique-{n}", chats).items()}
        chats = {
            i: revision_chat(by_id[i], current[i], critique, principles[i][n], few_shot)
            for i, critique in critiques.items()
        }
        revised = complete(engine, f"revision-{n}", chats)
        current = {i: c.text for i, c in revised.items()}
        for i, c in revised.items():
            steps[i].append(RevisionStep(principle=principles[i][n].id, critique=critiques[i] or "", revision=c.text))
            ended[i].append(c.ended)
    for prompt in prompts:
        if prompt.id in current or (prompt.id in first and prompt.id not in revised_ids):
            yield RevisionChain(
                id=prompt.id,
                prompt=prompt.prompt,
                response=first[prompt.id].text,
                steps=tuple(steps[prompt.id]),
                source=prompt.source,
                meta={**(meta or {}), "ended": ended[prompt.id]},  # of the response, then of each revision
            )


def _complete(
    engine: Engine, step: str, chats: dict[str, Chat], sampling: Sampling, seed: int, failed: OnFailure | None
) -> dict[str, Completion]:
    """The completion of each chat, by prompt id. Failed completions are reported to `failed` and left out."""
    requests = [GenerationRequest(f"{i}/{step}", chat, seed=seed) for i, chat in chats.items()]
    completions = {}
    for completion in engine.generate(requests, sampling):
        prompt_id = completion.id.rsplit("/", 1)[0]
        if completion.error is None:
            completions[prompt_id] = completion
        elif failed:
            failed(Failure(prompt_id, completion.error, completion.again))
    return completions
