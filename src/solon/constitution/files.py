"""Constitutions as YAML. Every error names its line, and a written constitution reads back equal.

`solon.yaml_text` reads the file, as it reads recipes; the rules are those of the constitution's model.
"""

from __future__ import annotations

import re
import textwrap
from importlib import resources
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from solon.constitution.check import KINDS, Check
from solon.constitution.model import Constitution, Example, Principle
from solon.errors import InputError, nearest, quoted
from solon.yaml_text import Where, YamlText, read_bytes, with_article

_WORDS = {"true", "false", "null", "yes", "no", "on", "off", "y", "n"}  # not text in YAML 1.1 or 1.2


def builtin_names() -> list[str]:
    """The names of the constitutions that come with Solon, sorted."""
    library = resources.files("solon.constitution") / "library"
    return sorted(f.name.removesuffix(".yaml") for f in library.iterdir() if f.name.endswith(".yaml"))


def load_constitution(spec: str) -> Constitution:
    """The built-in constitution of that name, or else the one in that file (`./NAME` where both exist).

    Raises InputError: one line that begins with FILE:LINE where the file is wrong.
    """
    spec = str(spec)
    known = builtin_names()
    if spec in known:
        file = resources.files("solon.constitution") / "library" / f"{spec}.yaml"
        return parse_constitution(file.read_bytes(), str(file))
    try:
        data = read_bytes(Path(spec))
    except FileNotFoundError:
        hint = nearest(spec, known) or ";"
        names = ", ".join(known) or "none"
        raise InputError(f"no constitution and no file is named {quoted(spec)}{hint} built in: {names}") from None
    except (OSError, ValueError) as e:
        why = getattr(e, "strerror", None) or str(e)
        raise InputError(f"cannot read {quoted(spec)}: {why}; give a YAML file or a built-in constitution") from None
    return parse_constitution(data, spec)


def parse_constitution(data: bytes, file: str) -> Constitution:
    """The constitution in a file's bytes. file: the name in errors."""
    source = _Source.of_bytes(
        data, file, what="constitution", a_few="principles", expected=f"a mapping with {_names(Constitution)}"
    )
    plain = source.read()
    try:
        constitution = Constitution.model_validate(plain)
    except ValidationError as e:
        # The first error in the file, but missing keys last: a mistyped key is unknown and missing, a list of wrong
        # principles is wrong and too short, and the first of the two errors says more.
        last = {"missing": 1, "too_short": 2}
        errors: list[dict[str, Any]] = [{**error, "loc": _loc(dict(error))} for error in e.errors()]
        first = min(errors, key=lambda error: (last.get(error["type"], 0), source.place(error["loc"]).at))
        source.fail(source.position(first), source.message(first, plain))
    for where, place in source.places.items():  # a key without a value is a mistake, also for an optional key
        if place.kind == "nothing":
            source.fail(place.at, source.message({"loc": where, "type": "nothing"}, plain))
    return constitution


class _Source(YamlText):
    """A constitution's text, and messages for its errors."""

    def position(self, error: dict[str, Any]) -> int:
        """The position of one of pydantic's errors, in characters."""
        place = self.place(error["loc"])
        if error["type"] == "extra_forbidden":
            return place.key
        if error["type"] == "placeholder":  # its own line, unless an escape hides it
            return max(self.text.find(error["ctx"]["found"], place.at), place.at)
        return place.at

    def message(self, error: dict[str, Any], plain: Any) -> str:
        """One of pydantic's errors in words, with its remedy."""
        where, kind = error["loc"], error["type"]
        model = _model_at(where[:-1], plain)
        whose, name = _whose(where[:-1], plain), where[-1]
        if isinstance(name, int):  # an item of a list
            whose, name = _whose(where[:-2], plain), f"{where[-2]} item {name + 1}"
            wanted = "text" if where[-2] == "tags" else f"a mapping with {_names(_model_at(where, plain))}"
        else:
            field = model.model_fields.get(name)  # none for an unknown key, and for the kind of an unknown check
            wanted = field.description or "" if field else f"one of {', '.join(KINDS)}"
        subject = f"{whose}: {name}" if whose else str(name)
        got = self.place(where)
        if kind == "missing":
            return f'{whose or "the constitution"} has no {name}; add "{name}:", {wanted}'
        if kind == "extra_forbidden":
            known = list(model.model_fields)
            hint = nearest(str(name), known) or f"; the keys here are {', '.join(known)}"
            return f"{whose + ': ' if whose else ''}unknown key {quoted(str(name))}{hint}"
        if kind in ("placeholder", "kebab", "repeated_id", "check"):
            return f"{subject} {error['msg']}"
        if kind == "union_tag_not_found":
            return f'{subject} has no kind; add "kind:", one of {", ".join(KINDS)}'
        if kind == "string_too_short" or got.kind == "nothing":
            return f"{subject} is empty; write {wanted}" + _or_remove(model, where)
        if kind == "too_short":
            return f"{subject} is empty; add at least one principle"
        if kind == "string_unicode":
            return f"{subject} holds half of a surrogate pair; write the whole character"
        if kind == "string_type" and got.kind in ("number", "truth value"):
            return f'{subject} is a {got.kind}, not text; quote it: "{got.raw}"'
        if kind == "string_type":
            return f'{subject} is {with_article(got.kind)}, not text; quote it, or write ">-" and the text below it'
        if kind in ("union_tag_invalid", "literal_error") and got.kind == "text":
            known = list(KINDS) if kind == "union_tag_invalid" else list(get_args(model.model_fields[name].annotation))
            hint = nearest(got.raw, known) or f"; it is one of {', '.join(known)}"
            return f"{subject} is {quoted(got.raw)}{hint}"
        if kind == "string_pattern_mismatch":
            return f"{subject} is {quoted(got.raw)}; expected {wanted}"
        if where[-1] == "weight" or ("check" in where[:-1] and name != "kind"):
            shown = quoted(got.raw)[1:-1] if got.kind in ("number", "truth value") else with_article(got.kind)
            return f"{subject} is {shown}; expected {wanted}, without quotes" + _or_remove(model, where)
        return f"{subject} is {with_article(got.kind)}; expected {wanted}"


def to_yaml(constitution: Constitution) -> str:
    """A file that loads back to an equal constitution. Keys with their default values are left out."""
    top = ("name", "version", "description")
    lines = [f"{name}: {_written(getattr(constitution, name), 2)}" for name in top]
    lines.append("principles:")
    for p in constitution.principles:
        lines.append(f"  - id: {_written(p.id, 6)}")
        texts = ("title", "critique", "revision", "comparison")
        lines += [f"    {name}: {_written(getattr(p, name), 6)}" for name in texts]
        if p.weight != 1.0:
            lines.append(f"    weight: {p.weight!r}")
        if p.check:
            lines.append(f"    check: {inline_check(p.check)}")
        if p.tags:
            lines.append(f"    tags: [{', '.join(_inline(tag, '[A-Za-z][A-Za-z0-9-]*') for tag in p.tags)}]")
        for n, example in enumerate(p.examples):
            lines += ["    examples:"] if n == 0 else []
            for first, name in enumerate(Example.model_fields):
                mark = "-" if first == 0 else " "
                lines.append(f"      {mark} {name}: {_written(getattr(example, name), 10)}")
    return "\n".join(lines) + "\n"


def inline_check(check: Check) -> str:
    """A check as YAML on one line."""

    def shown(value: Any) -> str:
        if isinstance(value, bool):
            return str(value).lower()
        return _inline(value, "[A-Za-z][A-Za-z-]*") if isinstance(value, str) else repr(value)

    return f"{{{', '.join(f'{name}: {shown(value)}' for name, value in check.parameters().items())}}}"


def _written(text: str, indent: int) -> str:
    """A text as a value: on the key's line where it is short, else as a YAML block."""
    lines = text.split("\n")
    plain = all(line.isprintable() and line == line.strip(" ") for line in lines)
    if not plain or (len(lines) == 1 and len(text) <= 80) or "" in (lines[0], lines[-1]):
        return _inline(text)
    style = "|-"
    if len(lines) == 1 and "  " not in text:
        style = ">-"  # folded: single spaces become line breaks and come back
        lines = textwrap.wrap(text, 100, break_long_words=False, break_on_hyphens=False)
    return "\n".join([style, *(" " * indent + line if line else "" for line in lines)])


def _inline(text: str, bare: str = r"[A-Za-z][A-Za-z0-9 ,.;?!'(){}/-]*") -> str:
    """A text on one line, in quotes unless `bare` matches it and no reader takes it for something else."""
    if re.fullmatch(bare, text) and text.lower() not in _WORDS:
        return text
    named = {'"': '\\"', "\\": "\\\\", "\n": "\\n"}
    return '"' + "".join(named.get(c, c if c.isprintable() else f"\\U{ord(c):08x}") for c in text) + '"'


def _loc(error: dict[str, Any]) -> Where:
    """The location of an error in the file. Pydantic's location differs from the file in three cases.

    Pydantic reports a repeated id at the list; here the location is the second id. Inside a check, pydantic's location
    holds the kind as a step. Pydantic reports an unknown kind at the check; here the location is the kind.
    """
    where: Where = error["loc"]
    if len(where) > 3 and where[2] == "check":
        where = (*where[:3], *where[4:])
    if error["type"] == "union_tag_invalid":
        where = (*where, "kind")
    return (*where, error["ctx"]["index"], "id") if error["type"] == "repeated_id" else where


def _model_at(where: Where, plain: Any) -> type[BaseModel]:
    if where[2:3] == ("check",):
        return KINDS.get(str(plain["principles"][where[1]]["check"].get("kind")), BaseModel)
    return Example if "examples" in where else Principle if "principles" in where else Constitution


def _whose(where: Where, plain: Any) -> str:
    """The principle, and its example or check, that holds a location, in words; empty for the constitution itself."""
    if len(where) < 2:
        return ""
    name = plain["principles"][where[1]]
    name = name.get("id") if isinstance(name, dict) else None
    who = f"principle {quoted(name) if isinstance(name, str) and name else int(where[1]) + 1}"
    if where[2:3] == ("check",):
        return f"{who}, check"
    return f"{who}, example {int(where[3]) + 1}" if len(where) > 3 else who


def _or_remove(model: type[BaseModel], where: Where) -> str:
    field = model.model_fields.get(str(where[-1]))
    return ", or remove the key" if field and not field.is_required() else ""


def _names(model: type[BaseModel]) -> str:
    return ", ".join(name for name, field in model.model_fields.items() if field.is_required())
