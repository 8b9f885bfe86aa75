"""The errors that a person reads, and the safe display of other people's text."""

from __future__ import annotations


class InputError(Exception):
    """The user's input cannot be used. The message is one line: the fault, its place, the remedy.

    The command line prints only the message and exits with 2.
    """


class Unfit(InputError):
    """One text that a model cannot take: longer than its context, or refused by its chat template.

    Among many texts, this text is left out (or the judge abstains) and counted under `reason`.
    """

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason  # "too long", "not rendered"


class Diverged(Exception):
    """The numbers of a training are not finite, and there is no good step to write. The message is one line; exit code 1."""


class Outage(Exception):
    """A service that answered before answers no request any more. The message is one line; the exit code is 1.

    Work stops and everything finished is kept. The same command, run again, sends the requests that are left.
    """


class NothingAnswered(Exception):
    """No item of a command got an answer. The message is one line; the exit code is 1."""


def nearest(word: str, known: list[str]) -> str:
    """`; did you mean "x"?` for the known word closest to `word`, or an empty string."""
    import difflib

    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f'; did you mean "{close[0]}"?' if close else ""


def quoted(text: str) -> str:
    """At most 80 characters of the text in double quotes, on one line, without control characters."""
    return '"' + "".join(c if c.isprintable() and c not in '"\\' else ascii(c)[1:-1] for c in text[:80]) + '"'


def printable(text: str, most: int = 500) -> str:
    """Other people's text on one line of at most `most` characters, without control characters.

    White space becomes a space. A control character, half of a surrogate pair, or a mark that turns the direction of
    writing becomes its escape.
    """
    shown = "".join(
        c if c.isprintable() else " " if c.isspace() else c.encode("unicode_escape").decode("ascii") for c in text
    )
    shown = " ".join(shown.split())
    return shown if len(shown) <= most else shown[: most - 1] + "…"
