"""Under which principle a labelled comparison is judged: its own where the constitution says the same, not by chance."""

from __future__ import annotations

import pytest

from solon.constitution import Constitution, load_constitution
from solon.data import read_comparisons
from solon.feedback.principles import own_principle, own_principles, question_for
from solon.feedback.questions import HHH, examples_from
from solon.records import Comparison, assistant, user

SHIPPED = [c for name in ("harmless", "helpful") for c in read_comparisons(f"solon:comparisons-{name}")]
SOLON, SIMPLE = load_constitution("solon"), load_constitution("simple")


def changed(constitution: Constitution, principle: str, **new: str) -> Constitution:
    principles = [p.model_copy(update=new) if p.id == principle else p for p in constitution.principles]
    return constitution.model_copy(update={"principles": tuple(principles)})


def test_shipped_comparisons_belong_to_the_shipped_constitution() -> None:
    asked, others = own_principles(SHIPPED, SOLON)
    assert others == 0 and all([p.id for p in asked[c.id]] == [c.principle] for c in SHIPPED)


def test_an_id_shared_by_chance_is_not_the_same_principle() -> None:
    """`simple` has a principle not-preachy too, in other words."""
    shared = {p.id for p in SIMPLE.principles} & {c.principle for c in SHIPPED}
    assert shared == {"not-preachy"}
    asked, others = own_principles(SHIPPED, SIMPLE, principles=1, seed=3)
    assert others == len(SHIPPED)
    named = {p.id for found in asked.values() for p in found}
    assert named == {p.id for p in SIMPLE.principles}  # drawn as for any pair: the run's own constitution
    general, _ = own_principles(SHIPPED, SIMPLE, HHH)
    assert {p.comparison for found in general.values() for p in found} == {HHH}
    every, _ = own_principles(SHIPPED, SIMPLE, principles=None)
    assert all(found == list(SIMPLE.principles) for found in every.values())


def test_a_constitution_with_one_principle_changed_keeps_the_others() -> None:
    mine = changed(SOLON, "be-truthful", comparison="Which response is true?")
    of_it = sum(c.principle == "be-truthful" for c in SHIPPED)
    assert own_principles(SHIPPED, mine)[1] == of_it > 0
    titled = changed(SOLON, "be-truthful", title="Another title", revision="Rewrite it.")  # the judge is asked the same
    assert own_principles(SHIPPED, titled)[1] == 0


def test_a_users_own_ids_are_believed_and_those_of_another_constitution_are_not() -> None:
    mine = Comparison(
        id="1", prompt=(user("q"),), chosen=(assistant("a"),), rejected=(assistant("b"),), label=1.0,
        principle="not-preachy", labeler="human",
    )  # fmt: skip
    assert own_principle(mine, SIMPLE) is not None
    same = mine.model_copy(update={"meta": {"constitution": SIMPLE.fingerprint}})
    other = mine.model_copy(update={"meta": {"constitution": "0123456789abcdef"}})
    assert own_principle(same, SIMPLE) is not None and own_principle(other, SIMPLE) is None
    assert question_for(other, SIMPLE, "Which?") == "Which?" and question_for(same, SIMPLE, "Which?") != "Which?"
    assert own_principle(mine.model_copy(update={"principle": None}), SIMPLE) is None


@pytest.mark.parametrize("rules", [SOLON, SIMPLE])
def test_examples_are_asked_what_the_run_asks(rules: Constitution) -> None:
    shown = examples_from(SHIPPED[:8], lambda c: question_for(c, rules, HHH))
    expected = [next(p.comparison for p in SOLON.principles if p.id == c.principle) for c in SHIPPED[:8]]
    assert [e.question for e in shown] == (expected if rules is SOLON else [HHH] * 8)


def test_a_question_in_place_of_the_constitution_is_asked_of_all() -> None:
    rules = Constitution.from_question("Which is better?")
    asked, others = own_principles(SHIPPED, rules)
    assert others == len(SHIPPED) and {p.comparison for ps in asked.values() for p in ps} == {"Which is better?"}
