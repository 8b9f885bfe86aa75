"""Whether a model still makes sense, by measures that no training pushes on.

A model that training has broken writes fluent words that do not answer. Refusals, length and reward do not see it. Three measures do:

- *about its question*: an embedding model compares each answer with the question it answers and with all other questions. The
  value is the share of the other questions that are less like the answer than its own: 1 for an answer that fits its own question
  best, 0.5 for an answer that could belong to any question.
- *likely under the start model*: how probable the start model finds the answer to the question, in nats per word.
- *KL to the start model*: how far the model has moved, on harmless prompts, where it has no need to move.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from solon.data.heldout import normalised
from solon.engines import Engine, ScoreRequest
from solon.measures.texts import words
from solon.models.embedding import Embedder
from solon.records import Chat


def question_of(prompt: Chat) -> str:
    """The last turn of the user: what the answer is about."""
    return next((m.content for m in reversed(prompt) if m.role == "user"), prompt[-1].content)


def about_their_questions(questions: Sequence[str], answers: Sequence[str], embedder: Embedder) -> list[float | None]:
    """For each answer, the share of the other questions that are less like the answer than its own question, 0..1.

    A question that is as like counts one half. An empty answer is about nothing: 0. None where there is no other question.
    """
    asked = embedder.embed(questions).numpy()
    likeness: NDArray[np.float32] = embedder.embed(answers).numpy() @ asked.T
    names = [normalised(q) for q in questions]
    shares: list[float | None] = []
    for i, answer in enumerate(answers):
        others = [j for j, name in enumerate(names) if name != names[i]]
        if not others or not words(answer):
            shares.append(0.0 if others else None)
            continue
        less, equal = likeness[i, others] < likeness[i, i], likeness[i, others] == likeness[i, i]
        shares.append(float(less.mean() + equal.mean() / 2))
    return shares


def likelihoods(items: Iterable[tuple[str, Chat, str]], engine: Engine) -> dict[str, float]:
    """The log-probability of each answer under the engine's model, in nats per word. items: (id, prompt, answer).

    Answers without a word, and those that the engine gives no value for, are left out.
    """
    counted = {name: (prompt, answer, n) for name, prompt, answer in items if (n := words(answer))}
    requests = [ScoreRequest(name, prompt, (answer,)) for name, (prompt, answer, _) in counted.items()]
    values = {}
    for scores in engine.score(requests):
        if scores.error is None and scores.logprobs[0] is not None and np.isfinite(scores.logprobs[0]):
            values[scores.id] = scores.logprobs[0] / counted[scores.id][2]
    return values
