"""The reasoning and the answer in the text of a reasoning model.

Such a model writes its reasoning before the answer, between `<think>` and `</think>` (Qwen 3, DeepSeek-R1) or in another form.
The reasoning is not part of the answer: not of a response, a critique, a rationale or a training text, and no option letter is
read from it.
"""

from __future__ import annotations

import re

# Pairs of opening and closing mark: Qwen, DeepSeek and most others; Mistral; Seed; forms that prompts ask for.
MARKS = (
    ("<think>", "</think>"),
    ("[THINK]", "[/THINK]"),
    ("<seed:think>", "</seed:think>"),
    ("<thinking>", "</thinking>"),
    ("<thought>", "</thought>"),
    ("<reasoning>", "</reasoning>"),
)
# Many chat templates write the opening mark themselves, so the text of the model holds only the closing mark.
OPENED_BY_TEMPLATE = MARKS[:3]
_FINAL = re.compile(r"<\|channel\|>\s*final\s*(?:<\|constrain\|>[^<]*)?<\|message\|>")  # GPT-OSS ("harmony")
_HARMONY_END = re.compile(r"<\|(?:end|return|start|call)\|>")


def without_reasoning(text: str) -> str:
    """The answer in a model's text; the whole text where it has no reasoning.

    Where the reasoning does not end (the text was cut at max_tokens), the answer is empty.
    """
    return split_reasoning(text)[1]


def split_reasoning(text: str) -> tuple[str, str]:
    """(reasoning, answer), both without marks; ("", text) where there is no reasoning."""
    if text.lstrip().startswith("<|channel|>"):
        return _harmony(text.lstrip())
    reasoning: list[str] = []
    answer = text
    while True:
        rest = answer.lstrip()
        marks = next((m for m in MARKS if rest.startswith(m[0])), None)
        if marks is None:
            break
        thought, _, answer = rest[len(marks[0]) :].partition(marks[1])
        reasoning.append(thought.strip())
    if not reasoning:
        for opening, closing in OPENED_BY_TEMPLATE:
            thought, closed, rest = text.partition(closing)
            if closed and opening not in thought:  # an answer about the marks would name both
                reasoning, answer = [thought.strip()], rest
                break
    return ("\n".join(reasoning), answer.strip()) if reasoning else ("", text)


def in_reasoning(text: str) -> bool:
    """Whether an unfinished text is still inside its reasoning, so that its answer has not begun."""
    reasoning, answer = split_reasoning(text)
    if answer.strip():
        return False
    start = text.strip()
    return bool(reasoning) or any(start.startswith(m[0]) or (start and m[0].startswith(start)) for m in MARKS)


def _harmony(text: str) -> tuple[str, str]:
    final = _FINAL.search(text)
    if final is None:
        return text, ""
    return text[: final.start()], _HARMONY_END.split(text[final.end() :])[0].strip()
