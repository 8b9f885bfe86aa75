"""What a constitution is: principles, each able to ask for a critique, a revision and a comparison.

Bai et al. 2022 (arXiv 2212.08073) writes two lists, one of critique and revision requests (appendix C.1) and
one of comparison questions (C.2). Here a principle holds all three, so one id follows it through every stage.

The rules below hold however a constitution is made; `files` adds the file's name and line to what they say.
White space around a text is dropped: YAML's block styles differ there, and it is no part of a request.
"""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from pydantic_core import PydanticCustomError

from solon.constitution.check import Check
from solon.errors import InputError, quoted
from solon.records import fingerprint

Text = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]
# What `solon.supervised.critique_revision.fill` puts in place, by field.
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

    prompt: Text = Field(description="what the user said")
    response: Text = Field(description="the response to improve")
    critique: Text = Field(description="a good critique of it")
    revision: Text = Field(description="the response rewritten")


class Principle(_Part):
    id: str = Field(description="a name in kebab-case, such as no-harm")
    title: Text = Field(description="a few words for people")
    critique: Text = Field(description="a request for a critique of the response")
    revision: Text = Field(description="a request to rewrite the response")
    comparison: Text = Field(description="a question: which of two responses is better?")
    weight: float = Field(  # chance of being drawn, and share in an average, relative to the others
        default=1.0, gt=0, allow_inf_nan=False, strict=True, description="a finite number above 0"
    )
    tags: tuple[Text, ...] = Field(default=(), description="a list of words")
    examples: tuple[Example, ...] = Field(default=(), description="a list of worked examples")
    check: Check | None = Field(  # where there is one, it compares responses, and no model is asked
        default=None, discriminator="kind", description="a mapping with kind and what that kind needs"
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
                continue  # the judge gets the question as it stands: only what looks filled in would mislead
            use = " or ".join("{" + a + "}" for a in allowed)
            raise PydanticCustomError(
                "placeholder",
                "holds {found}, which is not filled in here; {use}drop the braces",
                {"found": "{" + name + "}", "use": f"use {use}, or " if use else ""},
            )
        return text


class Constitution(_Part):
    name: Text = Field(description="what people call it")
    version: Text = Field(description='its version, in quotes, such as "1.0"')
    description: Text = Field(description="what it is for")
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
        """Sixteen hex digits of all that decides what a model is asked, and of nothing else.

        In: each principle's critique, revision, comparison and examples, which a model reads; its check, which
        answers in a model's place; order and weight, which decide what is drawn; and the id, by which records and
        demonstrations find the words.
        Out: name, version, description, titles and tags, and whatever the YAML looked like.
        """
        return fingerprint("constitution", [_content(p) for p in self.principles])

    @classmethod
    def from_question(cls, question: str) -> Constitution:
        """A constitution of one comparison question: RLAIF without principles.

        Lee et al. 2023 (arXiv 2309.00267) label so.
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
            said = e.errors()[0]
            empty = "is empty; ask which of two responses is better"
            why = said["msg"] if said["type"] == "placeholder" else empty
            raise InputError(f"the question {why}") from None


def _content(p: Principle) -> list[object]:
    """What of a principle its fingerprint covers; the order of examples counts.

    A principle without a check is what it was before there were any, so fingerprints in older runs still hold.
    """
    examples = [[e.prompt, e.response, e.critique, e.revision] for e in p.examples]
    check = [p.check.parameters()] if p.check else []
    return [p.id, float(p.weight), p.critique, p.revision, p.comparison, examples, *check]
