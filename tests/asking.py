"""A model asked as a judge, in one call: for tests that look at single answers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from solon.constitution import Constitution
from solon.engines import Engine
from solon.feedback.judge import Asked, JudgeSettings, ModelJudge
from solon.feedback.ranking import Scheme
from solon.records import Candidates, Chat, Comparison, Pair, Ranking, Rating

ONE = JudgeSettings()


def compare(
    pairs: Iterable[Pair], engine: Engine, rules: Constitution, how: JudgeSettings = ONE, *, asked: Asked | None = None,
    failed: Any = None, **options: Any,
) -> Iterator[Comparison]:  # fmt: skip
    meta = options.pop("meta", {})
    return ModelJudge(engine, rules, how, meta=lambda: meta, **options).compare(pairs, asked=asked, failed=failed)


def rank(
    candidates: Iterable[Candidates], engine: Engine, rules: Constitution, how: JudgeSettings = ONE, *,
    scheme: Scheme = "all", seed: int = 0, failed: Any = None,
) -> Iterator[Ranking]:  # fmt: skip
    return ModelJudge(engine, rules, how, seed=seed).rank(candidates, scheme=scheme, failed=failed)


def rate(
    chats: Iterable[tuple[str, Chat]], engine: Engine, rules: Constitution, *, principles: int | None = 1,
    scale: str = "levels", seed: int = 0,
) -> Iterator[Rating]:  # fmt: skip
    how = JudgeSettings(principles_per_pair=principles, scale=scale)  # type: ignore[arg-type]
    return ModelJudge(engine, rules, how, seed=seed).rate(chats)
