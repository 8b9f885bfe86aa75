"""Principles that are verified: a check says of each response whether it keeps the principle, and no model is asked.

For what can be counted, a model is a dear and doubtful judge, and a count cannot be talked round by a response. A
comparison out of two counts is worth what the principle is worth and no more, so its certainty is bounded.
"""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Callable, Iterable
from functools import cache
from importlib.metadata import entry_points

import regex

from solon.constitution import Principle
from solon.constitution.check import Check, Entry, Length, Pattern, Readability, Repetition
from solon.errors import InputError, nearest
from solon.measures.texts import repetition, tokens, words
from solon.records import Chat, Judgement

# P(first is better) where the first response keeps the principle and the second breaks it. In log-odds, in which
# principles are averaged, 2.9: two equal principles of which a model gives the other side 95 % come to a tie.
CERTAIN = 0.95
PATTERN_SECONDS = 1.0  # of processor time for one search; some patterns take exponential time on some texts
ALLOW = "SOLON_ALLOW_CHECKS"
GROUP = "solon.checks"  # entry points of installed packages
Function = Callable[[Chat, str], float]


def satisfies(check: Check, prompt: Chat, response: str, *, allow_code: bool | None = None) -> float:
    """How well a response keeps a check: 1 kept, 0 broken, between them only for an entry that grades.

    White space around the response is no part of it, and every kind of line break is one. A response without a word
    keeps no check: it would be short and free of faults. allow_code: whether a function that the constitution names
    may run; None: where SOLON_ALLOW_CHECKS is 1.
    Raises InputError where a function may not run or is not found, TimeoutError where a pattern takes more than
    PATTERN_SECONDS, ValueError where a function's answer is not within 0..1, and whatever a function raises.
    """
    function = _function(check.function, _allowed(allow_code)) if isinstance(check, Entry) else None
    response = "\n".join(response.strip().splitlines())
    if not words(response):
        return 0.0
    if isinstance(check, Pattern):
        found = regex.search(check.pattern, response, timeout=PATTERN_SECONDS) is not None
        return float(found != check.forbid)
    if isinstance(check, Length):
        characters = len(" ".join(response.split()))
        in_words = _within(words(response), check.min_words, check.max_words)
        return float(in_words and _within(characters, check.min_characters, check.max_characters))
    if isinstance(check, Readability):
        score = readability(response, check.formula)
        return float(score is not None and _within(score, check.min, check.max))
    if isinstance(check, Repetition):
        return float(repetition(response, check.ngram) <= check.max)
    assert function is not None
    answer = function(prompt, response)
    kept = float(answer)
    if isinstance(answer, str) or not 0 <= kept <= 1:
        raise ValueError(f"{check.function} answered {answer!r}; a check answers True, False or a number in 0..1")
    return kept


def judge_by_check(
    principle: Principle, prompt: Chat, first: str, second: str, *, allow_code: bool | None = None
) -> Judgement:
    """Which response a principle's check favours. Order plays no part, so forward and swapped are equal.

    One keeps it and one breaks it: CERTAIN. Both the same: 0.5 exactly. Between them log-odds in proportion to the
    difference. A check that fails on a response abstains, with the reason. Raises InputError as `satisfies` does:
    that is for the user to put right, and the same for every pair.
    """
    if principle.check is None:
        raise ValueError(f"principle {principle.id} has no check")
    p, why = None, None
    try:
        one, other = (satisfies(principle.check, prompt, text, allow_code=allow_code) for text in (first, second))
        odds = (CERTAIN / (1 - CERTAIN)) ** (one - other)
        p = odds / (1 + odds)
    except InputError:
        raise
    except Exception as e:  # a function of the user's may raise anything
        why = f"the check failed: {type(e).__name__}: {e}"
    return Judgement(principle=principle.id, forward=p, swapped=p, weight=principle.weight, abstained=why, kind="check")


def require_runnable(principles: Iterable[Principle], *, allow_code: bool | None = None) -> None:
    """Raises InputError where a check's function may not run or is not found; so a run can say it at its start."""
    for principle in principles:
        if isinstance(principle.check, Entry):
            _function(principle.check.function, _allowed(allow_code))


def _within(value: float, low: float | None, high: float | None) -> bool:
    return (low is None or low <= value) and (high is None or value <= high)


# --- readability -------------------------------------------------------------------------------------------

_SENTENCE_END = re.compile(r"[.!?]+(?=[\s\"'”’)\]]|$)|\n")
_VOWELS = re.compile("[aeiouy]+")
_SILENT_E = re.compile(r"[^aeiouy]e[sd]?$")
_SPOKEN_E = re.compile(r"[^aeiouyl]les?$|[td]ed$|(?:[scxzg]|[cs]h)es$")


def readability(text: str, formula: str) -> float | None:
    """Flesch reading ease (Flesch 1948) or Flesch–Kincaid grade (Kincaid et al. 1975). English; None without words.

    A sentence ends at . ! ? before white space, a closing quote or bracket, or the end, and at a line break, so each
    item of a list is one; an abbreviation's point ends one too. Words are those of `metrics.tokens`.
    """
    found = tokens(text)
    if not found:
        return None
    sentences = sum(1 for part in _SENTENCE_END.split(text) if words(part))
    per_sentence = len(found) / sentences
    per_word = sum(map(syllables, found)) / len(found)
    if formula == "flesch-reading-ease":
        return 206.835 - 1.015 * per_sentence - 84.6 * per_word
    return 0.39 * per_sentence + 11.8 * per_word - 15.59


def syllables(word: str) -> int:
    """Of an English word in small letters, by a rule: its runs of vowels (a e i o u y), and at least one.

    A last e is silent unless an l after a consonant stands before it ("table"), and so is the e of a last "es" or
    "ed" unless what stands before it needs it ("boxes", "wanted"). Of the 54,000 running words of Solon's human data
    it counts 97.8 % as the CMU pronouncing dictionary 1.1.3 does, and 1.304 syllables a word for its 1.308.
    """
    silent = _SILENT_E.search(word) and not _SPOKEN_E.search(word)
    return max(1, len(_VOWELS.findall(word)) - bool(silent))


# --- functions of the user's -------------------------------------------------------------------------------


def _allowed(allow_code: bool | None) -> bool:
    return os.environ.get(ALLOW) == "1" if allow_code is None else allow_code


@cache
def _function(name: str, allowed: bool) -> Function:
    """The function of that name. One of an installed package needs no permission: installing it gave that."""
    module, colon, attribute = name.partition(":")
    if not colon:
        installed = {e.name: e for e in entry_points(group=GROUP)}
        if name not in installed:
            known = nearest(name, list(installed)) or f"; installed: {', '.join(installed) or 'none'}"
            raise InputError(f'no installed check is named "{name}"{known}; or name a function as module:function')
        load: Callable[[], Function] = installed[name].load
    elif not allowed:
        raise InputError(
            f"the check {name} runs code that a constitution names; if you trust it, set {ALLOW}=1 (in Python: "
            "allow_code=True)"
        )
    else:
        load = lambda: getattr(importlib.import_module(module), attribute)  # noqa: E731
    try:
        function = load()
    except Exception as e:  # an import runs code, which may raise anything
        why = " ".join(f"{type(e).__name__}: {e}".split())
        raise InputError(f"cannot load the check {name}: {why}; it must be importable (PYTHONPATH)") from e
    if not callable(function):
        raise InputError(f"the check {name} is a {type(function).__name__}, not a function")
    return function
