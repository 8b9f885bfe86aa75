"""Under which principle a labelled comparison is judged: its own one, where the constitution has it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

from solon.constitution import Constitution, Principle, builtin_names, draw_principles, load_constitution
from solon.records import Comparison


def own_principle(comparison: Comparison, constitution: Constitution) -> Principle | None:
    """The constitution's principle that a comparison was made under; None where it has none that says the same.

    An id alone proves nothing where the comparison names another constitution: two constitutions may call different
    principles by one name. Of a constitution that ships with Solon the words are known and compared. A comparison that
    names no constitution is the user's own, and so are its ids.
    """
    mine = next((p for p in constitution.principles if p.id == comparison.principle), None)
    made_under = comparison.meta.get("constitution")
    if mine is None or made_under in (None, constitution.fingerprint):
        return mine
    theirs = _shipped_questions().get((str(made_under), mine.id))
    return mine if theirs == mine.comparison else None


def question_for(comparison: Comparison, constitution: Constitution, otherwise: str) -> str:
    """The comparison question of its own principle, where the constitution has it."""
    own = own_principle(comparison, constitution)
    return otherwise if own is None else own.comparison


@cache
def _shipped_questions() -> dict[tuple[str, str], str]:
    """(constitution's fingerprint, principle's id) → its comparison question, of the constitutions that ship."""
    shipped = [load_constitution(name) for name in builtin_names()]
    return {(c.fingerprint, p.id): p.comparison for c in shipped for p in c.principles}


def own_principles(
    comparisons: Sequence[Comparison],
    constitution: Constitution,
    question: str | None = None,
    *,
    principles: int | None = 1,
    seed: int = 0,
) -> tuple[dict[str, list[Principle]], int]:
    """The principles to judge each comparison under, by its id; and how many have no principle of this constitution.

    Those are judged under the question; where it is None, under principles drawn as for any pair (None: all of them).
    """
    asked, others = {}, 0
    general = Constitution.from_question(question).principles[0] if question else None
    for c in comparisons:
        own = own_principle(c, constitution)
        others += own is None
        if own is not None:
            asked[c.id] = [own]
        elif general is not None:
            asked[c.id] = [general]
        elif principles is None:
            asked[c.id] = list(constitution.principles)
        else:
            asked[c.id] = draw_principles(constitution, principles, "compare", seed, c.id)
    return asked, others
