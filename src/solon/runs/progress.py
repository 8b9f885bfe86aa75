"""One line of progress on stderr, with the rate and the remaining time."""

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
def progress_line(console: Console, name: str, total: int, noun: str) -> Iterator[Callable[..., None]]:
    """Yields advance(n, {name: number to show}, total=None), which counts n more. noun: the word for the things counted.

    A quiet console shows nothing. Where stderr is no terminal (a log file, CI), a plain line is printed every half minute and at
    the end.
    """
    began = printed = time.monotonic()
    with Progress(
        SpinnerColumn(),
        TextColumn("{task.description:<18}", markup=False),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TextColumn(noun, markup=False),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[shown]}"),
        console=console,
        disable=console.quiet or not console.is_terminal,
    ) as bar:
        task = bar.add_task(name, total=total, rate="", shown="")
        done, expected = 0, total

        def advance(n: int, shown: dict[str, float], total: int | None = None) -> None:
            nonlocal done, printed, expected
            done, expected = done + n, total or expected
            rate = done / max(time.monotonic() - began, 1e-3)
            pace = f"{rate:.1f}/s" if rate >= 1 else f"{1 / max(rate, 1e-6):.1f} s each"
            text = "  ".join(f"{k} {v:.3g}" for k, v in shown.items())
            bar.update(task, advance=n, rate=pace if done else "", shown=text, total=total)
            now = time.monotonic()
            if not console.is_terminal and (now - printed > 30 or done == expected) and n:
                printed = now
                left = (expected - done) / max(rate, 1e-6)
                console.print(
                    f"{name}: {done}/{expected} {noun}, {pace}, {now - began:.0f} s, {left:.0f} s left  {text}"
                )

        yield advance


@contextmanager
def training_line(console: Console, name: str, total: int = 1, noun: str = "steps") -> Iterator[Training]:
    """Yields a trainer's callback step(done, total, {name: number to show}) that draws the line of `progress_line`."""
    with progress_line(console, name, total, noun) as advance:
        before = 0

        def step(done: int, total: int, shown: dict[str, float]) -> None:
            nonlocal before
            advance(done - before, shown, total)
            before = done

        yield step
