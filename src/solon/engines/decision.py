"""A decision model in this process: it answers typed questions with probabilities and writes no text.

`decision:DIR_OR_ID` names the model. transformers' `pipeline("decision")` runs a model with a decision head (Jev and similar
models), or any chat model, whose next-token scores of the option letters are then read. The decision template of the model
words the question. Solon gives the state, the question and the options separately, and transformers keeps control tokens in
them from becoming real ones.

A request holds one question: a template may put all questions of a request into one prompt, and then the answer under one
principle, or in one order, would depend on the others. The pipeline does no batching.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

from solon.engines.base import Completion, GenerationRequest, Question, Sampling, ScoreRequest, Scores, Usage
from solon.errors import InputError
from solon.models.loading import check_directory, check_finite, check_loading_info, explain_errors
from solon.models.weights import device, directory_of, model_fingerprint, resolve_dtype
from solon.records import fingerprint

ROUNDED = 0.05  # servers round, so the sum of the probabilities may differ from 1 by this amount
NOT_TYPED = "a decision model cannot be asked this: it is no typed question"
NAME = "q"  # the name of the one question in a request


def typed(question: Question, names: Sequence[str]) -> dict[str, Any]:
    """The question in the form of the System One API. names: the names of the options of a choice."""
    asked: dict[str, Any] = {"type": question.kind, "instructions": question.instructions}
    if question.kind == "choice":
        asked["criteria"] = dict(zip(names, question.criteria, strict=True))
    elif question.kind == "score":
        asked["criteria"] = list(question.criteria)
    elif question.criteria:
        asked["criteria"] = dict(zip(("true", "false"), question.criteria, strict=True))
    return asked


def probabilities(question: Question, names: Sequence[str], answer: Any) -> list[float]:
    """P of each option in a System One answer, in the order of `names`. Raises ValueError where the answer has none."""
    try:
        if question.kind == "noul":
            values = [answer["noul"], 1 - answer["noul"]]
        else:
            keys = names if question.kind == "choice" else [str(n) for n in range(len(question.criteria))]
            values = [answer["probabilities"][key] for key in keys]
        values = [float(p) for p in values]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"the answer is not one to a {question.kind} question ({type(error).__name__})") from None
    return check_distribution(values)


def check_distribution(values: list[float]) -> list[float]:
    """The values unchanged. Raises ValueError where they are not the probabilities of all options."""
    if not all(0 <= p <= 1 for p in values) or abs(sum(values) - 1) > ROUNDED:  # nan also fails the comparison
        raise ValueError(f"the options' probabilities are none: {', '.join(f'{p:g}' for p in values)}")
    return values


def log_probabilities(values: Sequence[float]) -> tuple[float, ...]:
    """Natural logarithms. The logarithm of exactly 0 is minus infinity."""
    return tuple(math.log(p) if p > 0 else -math.inf for p in values)


def no_text(name: str) -> InputError:
    return InputError(
        f"{name}: a decision model answers typed questions and writes no text; it can judge (label, feedback.judge, "
        "evaluate), without --rationales. For anything else give a chat model"
    )


class DecisionEngine:
    def __init__(self, pipe: Any, *, name: str, weights: str) -> None:
        """pipe: a `transformers.pipeline("decision")`. weights: fingerprint of the weights."""
        self.pipe, self.name, self._weights = pipe, name, weights
        self.usage = Usage()

    @classmethod
    def open(cls, spec: str, *, system: str | None, dtype: str) -> DecisionEngine:
        return cls.load(spec, dtype=dtype)

    @classmethod
    def load(cls, spec: str, *, dtype: str = "auto") -> DecisionEngine:
        """spec: `decision:` and a directory, a hub id or smollm2. Raises InputError where the model cannot be loaded."""
        from transformers import pipeline
        from transformers.decision.modeling_utils import DecisionMixin

        where = directory_of(spec.removeprefix("decision:"))
        check_directory(Path(where))
        options = {"use_safetensors": True}  # opening safetensors runs no code
        pipe: Any = explain_errors(
            f"{spec}: cannot be loaded as a decision model",
            lambda: pipeline(
                "decision", model=where, dtype=resolve_dtype(dtype, where), device=device(), model_kwargs=options
            ),
        )
        # The pipeline does not tell which tensors it initialised at random. The model, loaded once more without its
        # numbers, does. The from_pretrained of a decision model cannot tell; that of its parent class can.
        kind: Any = type(pipe.model)
        parent: Any = super(DecisionMixin, kind) if DecisionMixin in kind.__mro__ else kind
        load = parent.from_pretrained
        _, loading_info = load(where, config=pipe.model.config, device_map="meta", output_loading_info=True, **options)
        check_loading_info(where, loading_info)
        check_finite(pipe.model, where)
        if not (pipe.decision_config.chat_template or pipe.tokenizer.chat_template):
            raise InputError(f"{spec}: it has neither a decision template nor a chat template; use an instruct model")
        return cls(pipe, name=spec, weights=model_fingerprint(where))

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the weights, the decision template and its settings, the chat template and the dtype."""
        config, dtype = asdict(self.pipe.decision_config), str(self.pipe.model.dtype)
        return fingerprint("decision", self._weights, config, self.pipe.tokenizer.chat_template, dtype)

    def generate(self, requests: Iterable[GenerationRequest], sampling: Sampling) -> Iterator[Completion]:
        raise no_text(self.name)

    def score(self, requests: Iterable[ScoreRequest]) -> Iterator[Scores]:
        """Log-probability of each option. A request that the model cannot answer is a Scores with `error`."""
        for request in requests:
            abstention: tuple[None, ...] = (None,) * len(request.continuations)
            if request.question is None:
                yield Scores(request.id, abstention, NOT_TYPED)
                continue
            question, names = request.question, request.continuations
            try:
                inputs = self.pipe.preprocess({"state": question.state, "questions": {NAME: typed(question, names)}})
                tokens = sum(encoded["input_ids"].shape[-1] for encoded, _ in inputs["prompts"])
                answer = self.pipe.postprocess(self.pipe.forward(inputs)).get(NAME)
                values = probabilities(question, names, answer)
            except ValueError as error:
                self.usage.add(1, 0, 0)
                yield Scores(request.id, abstention, f"the decision model could not answer: {error}")
            else:
                self.usage.add(1, tokens, 0)
                yield Scores(request.id, log_probabilities(values))

    def close(self) -> None:
        """Free the memory of the model."""
        self.pipe = None
        gc.collect()


ENGINE = DecisionEngine
