"""The errors that a person is meant to read, and how text that others wrote is shown."""

from __future__ import annotations


class InputError(Exception):
    """Something the user gave cannot be used. The message is one line: what, where, what to do instead.

    The command line prints it and exits with 2; nothing else is printed.
    """


class Unfit(InputError):
    """One text that a model cannot be given as it is: beyond its context, or not to be rendered by its chat template.

    Where texts come in numbers, the text is left out (or the judge abstains) and is counted under `reason`.
    """

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason  # "too long", "not rendered"


class Diverged(Exception):
    """A training whose numbers are not finite, before there is anything worth writing. The message says so in one line.

    The command line prints the message and exits with 1.
    """


class Outage(Exception):
    """A service that answers many requests answers none any more. The message says so in one line.

    Work stops; everything finished is kept; what was not asked is asked when the same command runs again. The command
    line prints the message and exits with 1.
    """


class NothingAnswered(Exception):
    """A command whose every item was left without an answer. The message says so in one line; the exit code is 1."""


def nearest(word: str, known: list[str]) -> str:
    """`; did you mean "x"?` for the known word closest to `word`, or an empty string."""
    import difflib

    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f'; did you mean "{close[0]}"?' if close else ""


def quoted(text: str) -> str:
    """In double quotes, on one line, without control characters."""
    return '"' + "".join(c if c.isprintable() and c not in '"\\' else ascii(c)[1:-1] for c in text[:80]) + '"'


def printable(text: str, most: int = 500) -> str:
    """Text that others wrote, on one line of at most `most` characters, without what steers a terminal.

    A line break is shown as a space; a control character, half of a surrogate pair, or a mark that turns the direction
    of writing is shown as its escape.
    """
    shown = "".join(
        c if c.isprintable() else " " if c in "\t\n\r\x0b\x0c\x85\u2028\u2029" else _escape(c) for c in text
    )
    shown = " ".join(shown.split())
    return shown if len(shown) <= most else shown[: most - 1] + "…"


def _escape(character: str) -> str:
    return " " if character.isspace() else character.encode("unicode_escape").decode("ascii")
