"""The engine `judge:NAME` names a judge that is not a model (feedback/judges). The engine writes and scores nothing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from solon.engines.base import Completion, GenerationRequest, Sampling, ScoreRequest, Scores, Usage
from solon.errors import InputError
from solon.records import fingerprint


class JudgeName:
    def __init__(self, name: str) -> None:
        self.name, self.fingerprint, self.usage = name, fingerprint("judge", name), Usage()

    @classmethod
    def open(cls, spec: str, *, system: str | None, dtype: str) -> JudgeName:
        return cls(spec)

    def generate(self, requests: Iterable[GenerationRequest], sampling: Sampling) -> Iterator[Completion]:
        raise InputError(f"{self.name}: is a judge and writes no text; give a model")

    def score(self, requests: Iterable[ScoreRequest]) -> Iterator[Scores]:
        raise InputError(f"{self.name}: is a judge of responses and scores nothing else; give a model")


ENGINE = JudgeName
