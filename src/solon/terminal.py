"""Output to a terminal. Text of people and models never controls the terminal.

File names, record ids, prompts, answers and a server's messages may hold escape sequences, or words that rich takes for
markup. `Console` is rich's console without markup, with control characters shown instead of sent. `safe_streams` does the
same for everything that is printed. Rich's own colours and cursor movements still reach the terminal.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import IO, Any, TextIO, cast

import rich.console
from rich.segment import Segment
from rich.text import Text

# C0 without tab and line feed, delete, C1, marks that turn the direction of writing, halves of surrogate pairs.
_STEERING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def harmless(text: str) -> str:
    """The text with each control character as its JSON escape, so that printed JSON keeps its meaning."""
    return _STEERING.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


class Console(rich.console.Console):
    """rich's console for other people's text: no markup, no emoji codes, control characters shown."""

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, **options)

    @property
    def file(self) -> IO[str]:
        """The stream behind every proxy: rich lays one proxy over `_Stream` while it draws a progress bar."""
        file = super().file
        while (inner := getattr(file, "rich_proxied_file", None)) is not None:
            file = inner
        return cast(IO[str], file)

    @file.setter
    def file(self, new: IO[str]) -> None:
        rich.console.Console.file.fset(self, new)  # type: ignore[attr-defined]

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(harmless(text), **options)

    def render(self, renderable: Any, options: Any = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            text = segment.text if segment.control else harmless(segment.text)
            yield segment if text == segment.text else Segment(text, segment.style)


class _Stream:
    """A text stream that shows control characters. Rich writes its colours to the inner stream (`rich_proxied_file`)."""

    def __init__(self, stream: IO[str]) -> None:
        self.rich_proxied_file = stream

    def write(self, text: str) -> int:
        shown = harmless(text)
        encoding = getattr(self.rich_proxied_file, "encoding", None) or "utf-8"
        self.rich_proxied_file.write(shown.encode(encoding, "backslashreplace").decode(encoding))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.rich_proxied_file, name)


@contextmanager
def safe_streams() -> Iterator[None]:
    """Inside the `with` block, everything that is printed on stdout or stderr goes through `harmless`."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (
        stream if stream is None or isinstance(stream, _Stream) else cast(TextIO, _Stream(stream)) for stream in before
    )
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


def note(text: str) -> None:
    """Print a line on stderr that is no error."""
    print(f"solon: {harmless(text)}", file=sys.stderr)
