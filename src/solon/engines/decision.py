"""A decision model in this process: typed questions in, probabilities out, and no text.

`decision:DIR_OR_ID` names it. transformers' `pipeline("decision")` runs it: a model with a decision head (Jev and its
kin), or any chat model, whose option letters' next-token scores are then read. How the question is worded is the
model's own affair (its decision template); Solon gives the state, the question and the options apart from each other,
and transformers keeps control tokens written in any of them from becoming real ones.

One question a request: a template may put all questions of a request into one prompt, and then the answer under one
principle, or in one order, would depend on the others. Left out: batching, which the pipeline does not do.
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

ROUNDED = 0.05  # servers round: probabilities may sum to 1 give or take this
NOT_TYPED = "a decision model cannot be asked this: it is no typed question"
NAME = "q"  # of the one question in a request


def typed(question: Question, names: Sequence[str]) -> dict[str, Any]:
    """The question as the System One API takes it. names: what the options of a choice are called."""
    asked: dict[str, Any] = {"type": question.kind, "instructions": question.instructions}
    if question.kind == "choice":
        asked["criteria"] = dict(zip(names, question.criteria, strict=True))
    elif question.kind == "score":
        asked["criteria"] = list(question.criteria)
    elif question.criteria:
        asked["criteria"] = dict(zip(("true", "false"), question.criteria, strict=True))
    return asked


def probabilities(question: Question, names: Sequence[str], answer: Any) -> list[float]:
    """P of each option, in the order of `names`, out of a System One answer. Raises ValueError where it holds none."""
    try:
        if question.kind == "noul":
            found = [answer["noul"], 1 - answer["noul"]]
        else:
            told = answer["probabilities"]
            keys = names if question.kind == "choice" else [str(n) for n in range(len(question.criteria))]
            found = [told[key] for key in keys]
        found = [float(p) for p in found]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"the answer is not one to a {question.kind} question ({type(error).__name__})") from None
    return distribution(found)


def distribution(found: list[float]) -> list[float]:
    """The same numbers. Raises ValueError where they are not the probabilities of all the options there are."""
    if not all(0 <= p <= 1 for p in found) or abs(sum(found) - 1) > ROUNDED:  # not nan either
        raise ValueError(f"the options' probabilities are none: {', '.join(f'{p:g}' for p in found)}")
    return found


def logs(found: Sequence[float]) -> tuple[float, ...]:
    """Natural logarithms; that of exactly 0 is minus infinite."""
    return tuple(math.log(p) if p > 0 else -math.inf for p in found)


def no_text(name: str) -> InputError:
    return InputError(
        f"{name}: a decision model answers typed questions and writes no text; it can judge (label, feedback.judge, "
        "evaluate), without --rationales. For anything else give a chat model"
    )


class DecisionEngine:
    def __init__(self, pipe: Any, *, name: str, weights: str) -> None:
        """pipe: of `transformers.pipeline("decision")`. weights: fingerprint of the weights."""
        self.pipe, self.name, self._weights = pipe, name, weights
        self.usage = Usage()

    @classmethod
    def open(cls, spec: str, *, system: str | None, dtype: str) -> DecisionEngine:
        return cls.load(spec, dtype=dtype)

    @classmethod
    def load(cls, spec: str, *, dtype: str = "auto") -> DecisionEngine:
        """spec: `decision:` and a directory, a hub id or smollm2. Raises InputError where it cannot be loaded."""
        from transformers import pipeline
        from transformers.decision.modeling_utils import DecisionMixin

        where = directory_of(spec.removeprefix("decision:"))
        check_directory(Path(where))
        options = {"use_safetensors": True}  # nothing that runs code when opened
        pipe: Any = explain_errors(
            f"{spec}: cannot be loaded as a decision model",
            lambda: pipeline(
                "decision", model=where, dtype=resolve_dtype(dtype, where), device=device(), model_kwargs=options
            ),
        )
        # The pipeline does not tell which tensors it made up; loaded once more without their numbers, the model does.
        kind: Any = type(pipe.model)
        # A decision model's own from_pretrained cannot tell what it loaded; that of its parent can.
        parent: Any = super(DecisionMixin, kind) if DecisionMixin in kind.__mro__ else kind
        load = parent.from_pretrained
        _, found = load(where, config=pipe.model.config, device_map="meta", output_loading_info=True, **options)
        check_loading_info(where, found)
        check_finite(pipe.model, where)
        if not (pipe.decision_config.chat_template or pipe.tokenizer.chat_template):
            raise InputError(f"{spec}: it has neither a decision template nor a chat template; use an instruct model")
        return cls(pipe, name=spec, weights=model_fingerprint(where))

    @cached_property
    def fingerprint(self) -> str:
        """Of the weights, the decision template and its settings, the tokenizer's chat template and the dtype."""
        config, dtype = asdict(self.pipe.decision_config), str(self.pipe.model.dtype)
        return fingerprint("decision", self._weights, config, self.pipe.tokenizer.chat_template, dtype)

    def generate(self, requests: Iterable[GenerationRequest], sampling: Sampling) -> Iterator[Completion]:
        raise no_text(self.name)

    def score(self, requests: Iterable[ScoreRequest]) -> Iterator[Scores]:
        """Log-probability of each continuation's option. What the model cannot be asked is an error outcome."""
        for request in requests:
            nothing: tuple[None, ...] = (None,) * len(request.continuations)
            if request.question is None:
                yield Scores(request.id, nothing, NOT_TYPED)
                continue
            question, names = request.question, request.continuations
            try:
                asked = {"state": question.state, "questions": {NAME: typed(question, names)}}
                inputs = self.pipe.preprocess(asked)
                tokens = sum(given["input_ids"].shape[-1] for given, _ in inputs["prompts"])
                answer = self.pipe.postprocess(self.pipe.forward(inputs)).get(NAME)
                found = probabilities(question, names, answer)
            except ValueError as error:
                self.usage.add(1, 0, 0)
                yield Scores(request.id, nothing, f"the decision model could not answer: {error}")
                continue
            self.usage.add(1, tokens, 0)
            yield Scores(request.id, logs(found))

    def close(self) -> None:
        """Give the memory back."""
        self.pipe = None
        gc.collect()


ENGINE = DecisionEngine
