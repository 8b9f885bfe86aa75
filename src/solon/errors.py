"""The one error a person is meant to read."""


class InputError(Exception):
    """Something the user gave cannot be used. The message is one line: what, where, what to do instead.

    The command line prints it and exits with 2; nothing else is printed.
    """


def nearest(word: str, known: list[str]) -> str:
    """`; did you mean "x"?` for the known word closest to `word`, or an empty string."""
    import difflib

    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f'; did you mean "{close[0]}"?' if close else ""
