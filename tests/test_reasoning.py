"""The reasoning of a model is no part of its answer, whatever form it has."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from solon.models.chat.reasoning import MARKS, in_reasoning, split_reasoning, without_reasoning

plain = st.text(alphabet=st.characters(exclude_characters="<>[]|"), min_size=1).filter(str.strip)


@given(plain)
def test_a_text_without_reasoning_is_left_as_it_is(text: str) -> None:
    assert without_reasoning(text) == text


@given(plain, plain, st.sampled_from(MARKS))
def test_the_answer_is_what_follows_the_reasoning(thought: str, answer: str, marks: tuple[str, str]) -> None:
    text = f"{marks[0]}\n{thought}\n{marks[1]}\n\n{answer}"
    assert split_reasoning(text) == (thought.strip(), answer.strip())
    assert not in_reasoning(text)


@given(plain, st.sampled_from(MARKS))
def test_reasoning_that_does_not_end_leaves_no_answer(thought: str, marks: tuple[str, str]) -> None:
    assert without_reasoning(f"{marks[0]}\n{thought}") == ""
    assert in_reasoning(f"{marks[0]}\n{thought}")


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("I think of tea.\n</think>\n\nTea is a drink.", "Tea is a drink."),  # opened by the template
        ("<think></think>(A)", "(A)"),
        ("<think>a</think><think>b</think> (B)", "(B)"),
        ("<think>a <think> b</think> c", "c"),
        ("Write <think> and </think> around it.", "Write <think> and </think> around it."),
        ("<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>Tea.<|return|>", "Tea."),
        ("<|channel|>analysis<|message|>Hm, cut", ""),
        ("", ""),
    ],
)
def test_the_forms_that_models_write(text: str, answer: str) -> None:
    assert without_reasoning(text) == answer
