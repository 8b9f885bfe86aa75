"""Principles with a check: code decides whether a response follows the principle, and no model is asked.

A property that code can count needs no model: a count is cheaper and more reliable, and a response cannot argue with it. The
certainty of a comparison by check is bounded, so that a check weighs as much as another principle.
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

# P(first is better) where the first response follows the principle and the second does not. Principles are averaged in
# log-odds (here 2.9), so a check and an equal principle that a model decides with 95 % for the other side make a tie.
CERTAIN = 0.95
PATTERN_SECONDS = 1.0  # processor time for one search; some patterns take exponential time on some texts
ALLOW = "SOLON_ALLOW_CHECKS"
GROUP = "solon.checks"  # entry points of installed packages
Function = Callable[[Chat, str], float]


def satisfies(check: Check, prompt: Chat, response: str, *, allow_code: bool | None = None) -> float:
    """How well a response passes a check: 1 passed, 0 failed; a function of the user may give a value between them.

    White space around the response is ignored, and all kinds of line break are equal. A response without a word fails
    every check, because an empty response is short and free of faults. allow_code: whether a function that the
    constitution names may run; None: if SOLON_ALLOW_CHECKS is 1.
    Raises InputError where a function may not run or does not exist, TimeoutError where a pattern takes more than
    PATTERN_SECONDS, ValueError where the result of a function is not in 0..1, and any exception of a function.
    """
    function = _function(check.function, _allowed(allow_code)) if isinstance(check, Entry) else None
    response = "\n".join(response.strip().splitlines())
    if not words(response):
        return 0.0
    if isinstance(check, Pattern):
        matches = regex.search(check.pattern, response, timeout=PATTERN_SECONDS) is not None
        return float(matches != check.forbid)
    if isinstance(check, Length):
        characters = len(" ".join(response.split()))
        words_fit = _in_range(words(response), check.min_words, check.max_words)
        return float(words_fit and _in_range(characters, check.min_characters, check.max_characters))
    if isinstance(check, Readability):
        score = readability(response, check.formula)
        return float(score is not None and _in_range(score, check.min, check.max))
    if isinstance(check, Repetition):
        return float(repetition(response, check.ngram) <= check.max)
    assert function is not None
    answer = function(prompt, response)
    score = float(answer)
    if isinstance(answer, str) or not 0 <= score <= 1:
        raise ValueError(f"{check.function} answered {answer!r}; a check answers True, False or a number in 0..1")
    return score


def judge_by_check(
    principle: Principle, prompt: Chat, first: str, second: str, *, allow_code: bool | None = None
) -> Judgement:
    """The judgement of a principle's check. The order does not matter, so forward and swapped are equal.

    If one response passes and the other fails, P is CERTAIN. If both score the same, P is 0.5 exactly. Otherwise the
    log-odds are in proportion to the difference. A check that raises is an abstention with the reason. Raises InputError
    as `satisfies` does, because the user must correct that error and it is the same for every pair.
    """
    if principle.check is None:
        raise ValueError(f"principle {principle.id} has no check")
    p, reason = None, None
    try:
        one, other = (satisfies(principle.check, prompt, text, allow_code=allow_code) for text in (first, second))
        odds = (CERTAIN / (1 - CERTAIN)) ** (one - other)
        p = odds / (1 + odds)
    except InputError:
        raise
    except Exception as e:  # a function of the user may raise anything
        reason = f"the check failed: {type(e).__name__}: {e}"
    return Judgement(
        principle=principle.id, forward=p, swapped=p, weight=principle.weight, abstained=reason, kind="check"
    )


def require_runnable(principles: Iterable[Principle], *, allow_code: bool | None = None) -> None:
    """Raises InputError where a check's function may not run or does not exist. A run calls this at its start."""
    for principle in principles:
        if isinstance(principle.check, Entry):
            _function(principle.check.function, _allowed(allow_code))


def _in_range(value: float, low: float | None, high: float | None) -> bool:
    return (low is None or low <= value) and (high is None or value <= high)


# --- readability -------------------------------------------------------------------------------------------

_SENTENCE_END = re.compile(r"[.!?]+(?=[\s\"'”’)\]]|$)|\n")
_VOWELS = re.compile("[aeiouy]+")
_SILENT_E = re.compile(r"[^aeiouy]e[sd]?$")
_SPOKEN_E = re.compile(r"[^aeiouyl]les?$|[td]ed$|(?:[scxzg]|[cs]h)es$")


def readability(text: str, formula: str) -> float | None:
    """Flesch reading ease (Flesch 1948) or Flesch–Kincaid grade (Kincaid et al. 1975). English; None without words.

    A sentence ends at . ! ? before white space, a closing quote or bracket, or the end of the text, and at a line break.
    Each item of a list is therefore a sentence, and the point of an abbreviation also ends one. `texts.tokens` gives
    the words.
    """
    word_list = tokens(text)
    if not word_list:
        return None
    sentences = sum(1 for part in _SENTENCE_END.split(text) if words(part))
    per_sentence = len(word_list) / sentences
    per_word = sum(map(syllables, word_list)) / len(word_list)
    if formula == "flesch-reading-ease":
        return 206.835 - 1.015 * per_sentence - 84.6 * per_word
    return 0.39 * per_sentence + 11.8 * per_word - 15.59


def syllables(word: str) -> int:
    """The number of syllables of a lower-case English word: its runs of vowels (a e i o u y), and at least one.

    A last e is silent, unless a consonant and an l stand before it ("table"). The e of a last "es" or "ed" is silent,
    unless the letters before it need it ("boxes", "wanted"). docs/constitution.md compares the rule with a dictionary.
    """
    silent = _SILENT_E.search(word) and not _SPOKEN_E.search(word)
    return max(1, len(_VOWELS.findall(word)) - bool(silent))


# --- functions of the user -------------------------------------------------------------------------------


def _allowed(allow_code: bool | None) -> bool:
    return os.environ.get(ALLOW) == "1" if allow_code is None else allow_code


@cache
def _function(name: str, allowed: bool) -> Function:
    """The function of that name. A function of an installed package needs no permission: the installation gave it."""
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
        reason = " ".join(f"{type(e).__name__}: {e}".split())
        raise InputError(f"cannot load the check {name}: {reason}; it must be importable (PYTHONPATH)") from e
    if not callable(function):
        raise InputError(f"the check {name} is a {type(function).__name__}, not a function")
    return function
