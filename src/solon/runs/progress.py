"""One line of progress on stderr, with rate and time left."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from solon.training.settings import Progress as Training


@contextmanager
def progress_line(console: Console, name: str, total: int, what: str) -> Iterator[Callable[..., None]]:
    """Yields advance(n, {"shown": number}, total=None); drawn on `console` unless it is quiet.

    Where stderr is no terminal (a log file, CI), a plain line every half minute and at the end.
    """
    began = printed = time.monotonic()
    with Progress(
        SpinnerColumn(),
        TextColumn("{task.description:<18}", markup=False),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TextColumn(what, markup=False),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[shown]}"),
        console=console,
        disable=console.quiet or not console.is_terminal,
    ) as bar:
        task = bar.add_task(name, total=total, rate="", shown="")
        done, whole = 0, total

        def advance(n: int, shown: dict[str, float], total: int | None = None) -> None:
            nonlocal done, printed, whole
            done, whole = done + n, total or whole
            rate = done / max(time.monotonic() - began, 1e-3)
            pace = f"{rate:.1f}/s" if rate >= 1 else f"{1 / max(rate, 1e-6):.1f} s each"
            text = "  ".join(f"{k} {v:.3g}" for k, v in shown.items())
            bar.update(task, advance=n, rate=pace if done else "", shown=text, total=total)
            now = time.monotonic()
            if not console.is_terminal and (now - printed > 30 or done == whole) and n:
                printed = now
                left = (whole - done) / max(rate, 1e-6)
                console.print(f"{name}: {done}/{whole} {what}, {pace}, {now - began:.0f} s, {left:.0f} s left  {text}")

        yield advance


@contextmanager
def training_line(console: Console, name: str, total: int = 1, what: str = "steps") -> Iterator[Training]:
    """The same as a trainer's callback, which says where it is, of how many, and what to show."""
    with progress_line(console, name, total, what) as advance:
        done = 0

        def step(at: int, of: int, shown: dict[str, float]) -> None:
            nonlocal done
            advance(at - done, shown, of)
            done = at

        yield step
