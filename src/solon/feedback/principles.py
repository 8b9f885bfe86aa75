"""The principle under which a labelled comparison is judged: the comparison's own principle, if the constitution has it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

from solon.constitution import Constitution, Principle, builtin_names, draw_principles, load_constitution
from solon.records import Comparison


def own_principle(comparison: Comparison, constitution: Constitution) -> Principle | None:
    """The principle that the comparison names, if the constitution has a principle with the same id and words; else None.

    An id alone is not enough if the comparison names another constitution: two constitutions may use one id for
    different principles. The words of the shipped constitutions are known and compared. A comparison that names no
    constitution is the user's, and so are its ids.
    """
    principle = next((p for p in constitution.principles if p.id == comparison.principle), None)
    made_under = comparison.meta.get("constitution")
    if principle is None or made_under in (None, constitution.fingerprint):
        return principle
    question = _shipped_questions().get((str(made_under), principle.id))
    return principle if question == principle.comparison else None


def question_for(comparison: Comparison, constitution: Constitution, default: str) -> str:
    """The comparison question of the comparison's principle, if the constitution has it; else the default."""
    principle = own_principle(comparison, constitution)
    return default if principle is None else principle.comparison


@cache
def _shipped_questions() -> dict[tuple[str, str], str]:
    """(fingerprint of a shipped constitution, id of a principle) → the principle's comparison question."""
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
    """(principles of each comparison, by its id; number of comparisons whose principle the constitution does not have).

    The latter comparisons are judged under the question, or, where it is None, under `principles` principles that are
    drawn as for any pair (None: all principles).
    """
    asked, others = {}, 0
    general = list(Constitution.from_question(question).principles[:1]) if question else None
    for c in comparisons:
        if principle := own_principle(c, constitution):
            asked[c.id] = [principle]
            continue
        others += 1
        if general is not None:
            asked[c.id] = general
        elif principles is None:
            asked[c.id] = list(constitution.principles)
        else:
            asked[c.id] = draw_principles(constitution, principles, "compare", seed, c.id)
    return asked, others
