"""A constitution: principles, each with a critique request, a revision request and a comparison question.

Bai et al. 2022 (arXiv 2212.08073) have two lists, one of critique and revision requests (appendix C.1) and one of
comparison questions (C.2). Here one principle holds all three texts, so one id follows the principle through every stage.

The checks below hold for every constitution; `files` adds the file's name and line to their messages. White space around
a text is dropped, because YAML's block styles differ there.
"""

from __future__ import annotations

import random
import re
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from solon.constitution.check import Check
from solon.errors import InputError, quoted
from solon.records import fingerprint

Text = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]
# The placeholders that `solon.supervised.critique_revision.fill` replaces, by field.
PLACEHOLDERS: dict[str, tuple[str, ...]] = {
    "critique": ("prompt", "response"),
    "revision": ("prompt", "response", "critique"),
    "comparison": (),
}
_KEBAB = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")
_BRACED = re.compile(r"\{(\w+)\}")


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Example(_Part):
    """One worked critique and revision, shown to the model before its own turn."""

    prompt: Text = Field(description="the user's message")
    response: Text = Field(description="the response to improve")
    critique: Text = Field(description="a good critique of it")
    revision: Text = Field(description="the response rewritten")


class Principle(_Part):
    id: str = Field(description="a name in kebab-case, such as no-harm")
    title: Text = Field(description="a few words for people")
    critique: Text = Field(description="a request for a critique of the response")
    revision: Text = Field(description="a request to rewrite the response")
    comparison: Text = Field(description="a question: which of two responses is better?")
    weight: float = Field(  # relative chance of being drawn, and relative share in an average
        default=1.0, gt=0, allow_inf_nan=False, strict=True, description="a finite number above 0"
    )
    tags: tuple[Text, ...] = Field(default=(), description="a list of words")
    examples: tuple[Example, ...] = Field(default=(), description="a list of worked examples")
    check: Check | None = Field(  # a check compares the responses instead of a model
        default=None, discriminator="kind", description="a mapping with kind and the keys of that kind"
    )

    @field_validator("id")
    @classmethod
    def _kebab(cls, value: str) -> str:
        if not _KEBAB.fullmatch(value):
            suggested = "-".join(re.findall("[a-z0-9]+", value.lower())) or "no-harm"
            raise PydanticCustomError(
                "kebab",
                "is {got}; write small letters and digits joined by single hyphens, as in {wanted}",
                {"got": quoted(value), "wanted": quoted(suggested)},
            )
        return value

    @field_validator(*PLACEHOLDERS)
    @classmethod
    def _placeholders(cls, text: str, info: ValidationInfo) -> str:
        allowed = PLACEHOLDERS[info.field_name or ""]
        for name in _BRACED.findall(text):
            if name in allowed or not name.isidentifier():
                continue
            if not allowed and name not in PLACEHOLDERS["revision"]:
                continue  # the judge reads the question unchanged: only a name of a placeholder would mislead
            use = " or ".join("{" + a + "}" for a in allowed)
            raise PydanticCustomError(
                "placeholder",
                "holds {found}, which is not filled in here; {use}drop the braces",
                {"found": "{" + name + "}", "use": f"use {use}, or " if use else ""},
            )
        return text


class Constitution(_Part):
    name: Text = Field(description="the constitution's name")
    version: Text = Field(description='its version, in quotes, such as "1.0"')
    description: Text = Field(description="the constitution's purpose")
    principles: tuple[Principle, ...] = Field(min_length=1, description="a list of principles")

    @field_validator("principles")
    @classmethod
    def _unique(cls, principles: tuple[Principle, ...]) -> tuple[Principle, ...]:
        seen: dict[str, int] = {}
        for n, principle in enumerate(principles):
            first = seen.setdefault(principle.id, n)
            if first != n:
                raise PydanticCustomError(
                    "repeated_id",
                    "is {got}, as of principle {first}; give each principle its own id",
                    {"got": quoted(principle.id), "first": first + 1, "index": n},
                )
        return principles

    @property
    def fingerprint(self) -> str:
        """Sixteen hex digits of everything that decides the requests to a model, and of nothing else.

        Included: each principle's critique, revision, comparison and examples, which a model reads; the check, which
        answers instead of a model; order and weight, which decide the draw; and the id, by which records and
        demonstrations find the texts. Not included: name, version, description, titles, tags and the form of the YAML.
        """
        contents: list[list[object]] = []
        for p in self.principles:
            examples = [[e.prompt, e.response, e.critique, e.revision] for e in p.examples]
            # A principle without a check has no item for it, so the fingerprints in older runs stay valid.
            check = [p.check.parameters()] if p.check else []
            contents.append([p.id, float(p.weight), p.critique, p.revision, p.comparison, examples, *check])
        return fingerprint("constitution", contents)

    @classmethod
    def from_question(cls, question: str) -> Constitution:
        """A constitution of one comparison question: RLAIF without principles, as in Lee et al. 2023 (arXiv 2309.00267).

        Raises InputError where the question is empty or holds a placeholder.
        """
        try:
            return cls(
                name="question",
                version="1",
                description="One question, asked of every pair of responses.",
                principles=(
                    Principle(
                        id="question",
                        title="One question",
                        critique="Point out how the assistant's last response could be better.",
                        revision="Please rewrite the assistant's response to make it better.",
                        comparison=question,
                    ),
                ),
            )
        except ValidationError as e:
            error = e.errors()[0]
            empty = "is empty; ask which of two responses is better"
            raise InputError(f"the question {error['msg'] if error['type'] == 'placeholder' else empty}") from None


def draw_principles(constitution: Constitution, n: int, *key: Any) -> list[Principle]:
    """n principles drawn by weight; none is drawn again before all were drawn. The same key gives the same draw."""
    rng = random.Random(fingerprint("principles", *key))
    drawn: list[Principle] = []
    while len(drawn) < n:
        left = [p for p in constitution.principles if p not in drawn[-(len(drawn) % len(constitution.principles)) :]]
        left = left or list(constitution.principles)
        drawn.append(rng.choices(left, [p.weight for p in left])[0])
    return drawn


def of_constitution(constitution: Constitution) -> dict[str, Any]:
    """The part of an output's identity that says which constitution made the output."""
    return {"constitution": {"name": constitution.name, "fingerprint": constitution.fingerprint}}
