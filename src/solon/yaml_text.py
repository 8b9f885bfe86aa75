"""YAML as plain data, with the place of each value in the text. The one reader for constitutions, recipes and `--set`.

YAML 1.2 without anchors, aliases and tags: a reviewer sees the data that is loaded, and a few lines cannot grow to
gigabytes. Size and depth are limited; a key stands once; a date is a text. The caller checks the meaning of the values.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, Self

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import (
    AliasEvent,
    CollectionEndEvent,
    DocumentStartEvent,
    MappingStartEvent,
    NodeEvent,
    ScalarEvent,
)
from ruamel.yaml.nodes import ScalarNode
from ruamel.yaml.reader import ReaderError

from solon.errors import InputError, printable, quoted

LIMIT = 1 << 20  # bytes; a constitution of a hundred principles has about a tenth
DEPTH = 8  # a constitution needs five, a recipe four
_NOT_TEXT = {"int": "number", "float": "number", "bool": "truth value", "null": "nothing"}
_BEYOND = re.compile(r"\\U(?!000|0010)")
Where = tuple[int | str, ...]  # keys and indices from the top, as in pydantic's `loc`


class Place(NamedTuple):
    at: int  # where the value begins, in characters
    key: int  # where the value's key begins; the same as `at` in a list
    kind: str  # "text", "number", "truth value", "nothing", "list" or "mapping"
    raw: str = ""  # a scalar as it was written


class YamlText:
    """A YAML text as plain data, and where each value of it stood."""

    def __init__(self, file: str, text: str, *, what: str = "file", expected: str = "a mapping") -> None:
        """file: the name in errors. what: the kind of file, for errors. expected: the expected top level, in words."""
        self.file, self.what, self.expected = file, what, expected
        self.text = text.replace("\r\n", "\n").replace("\r", "\n")
        self.places: dict[Where, Place] = {}

    @classmethod
    def of_bytes(cls, data: bytes, file: str, *, what: str, a_few: str, expected: str) -> Self:
        """The text of a file's bytes. Raises InputError where the bytes are too many or not UTF-8."""
        if len(data) > LIMIT:
            fail(file, 1, f"the file is over 1 MiB; a {what} is a few KiB of {a_few}, so check the path")
        try:
            text = data.decode("utf-8-sig")
        except UnicodeDecodeError as e:
            fail(file, 1 + data.count(b"\n", 0, e.start), "this line is not UTF-8; save the file as UTF-8")
        return cls(file, text, what=what, expected=expected)

    def read(self, *, mapping: bool = True) -> Any:
        """The text's mapping; mapping=False: any kind of value, None for an empty text. Raises InputError with the line."""
        # The safe loader gives the same positions as the round-trip loader; comments are not needed.
        self.yaml = YAML(typ="safe", pure=True)
        try:
            return self._document(self.yaml.parse(self.text), mapping)
        except ReaderError as e:
            self.fail(e.position, f"the character U+{e.character:04X} may not stand in YAML; remove it")
        except MarkedYAMLError as e:
            mark = e.problem_mark or e.context_mark
            at_end = mark is None or not self.text[mark.index :].strip("\0 \n")
            if at_end and e.context_mark is not None:
                mark = e.context_mark  # an unclosed bracket or quote: its opening says more than the end of the file
            problem = printable(", ".join(part for part in (e.context, e.problem) if part))
            hint = 'check the indentation, and quote what holds ": " or begins with a sign'
            self.fail(mark.index if mark else 0, f"not valid YAML: {problem}; {hint}")
        except RecursionError:
            self.fail(0, f"nested too deeply for a {self.what}; check brackets and indentation")
        except (YAMLError, ValueError, OverflowError) as e:  # an escape beyond Unicode, which has no mark
            last = max((place.at for place in self.places.values()), default=0)
            escape = _BEYOND.search(self.text, last)
            wrong = printable(str(e))
            self.fail(escape.start() if escape else last, f"not valid YAML: {wrong}; correct the text after this point")

    def fail(self, at: int, message: str) -> NoReturn:
        fail(self.file, self.line(at), message)

    def line(self, at: int) -> int:
        return 1 + self.text.count("\n", 0, at)

    def place(self, where: Where) -> Place:
        """The place of the value, or of the nearest value around it."""
        while where not in self.places:
            where = where[:-1]
        return self.places[where]

    def _document(self, events: Iterator[Any], mapping: bool) -> Any:
        data: Any = None
        for event in events:
            if isinstance(event, DocumentStartEvent) and self.places:
                self.fail(event.start_mark.index, "a second document begins here; keep one per file")
            if isinstance(event, NodeEvent):
                data = self._value(event, events, (), None)
                if mapping and not isinstance(data, dict):
                    got = self.places[()].kind
                    self.fail(event.start_mark.index, f"the file holds {with_article(got)}; expected {self.expected}")
        if mapping and not self.places:
            self.fail(0, f"the file is empty; expected {self.expected}")
        return data

    def _refuse(self, event: Any) -> None:
        at = event.start_mark.index
        if isinstance(event, AliasEvent):
            self.fail(at, f"an alias (*{event.anchor}) is not allowed; write the value out")
        if event.anchor is not None:
            self.fail(at, f"an anchor (&{event.anchor}) is not allowed; remove it and write values out")
        if event.tag is not None:
            tag = event.tag.replace("tag:yaml.org,2002:", "!!")
            self.fail(at, f"a tag ({tag}) is not allowed; remove it, and quote the value if it is text")

    def _value(self, event: Any, events: Iterator[Any], where: Where, key: int | None) -> Any:
        self._refuse(event)
        at = event.start_mark.index
        if len(where) > DEPTH:
            self.fail(at, f"nested too deeply for a {self.what}; check brackets and indentation")
        key = at if key is None else key
        if isinstance(event, ScalarEvent):
            kind = "text"
            if event.style is None:
                tag = str(self.yaml.resolver.resolve(ScalarNode, event.value, (True, False)))
                kind = _NOT_TEXT.get(tag.rsplit(":", 1)[-1], "text")
            if kind == "nothing":
                at = key  # the parser puts a missing value on a later line
            self.places[where] = Place(at, key, kind, event.value)
            return scalar(kind, event.value)
        if isinstance(event, MappingStartEvent):
            self.places[where] = Place(at, key, "mapping")
            mapping: dict[str, Any] = {}
            while not isinstance(event := next(events), CollectionEndEvent):
                here = event.start_mark.index
                if not isinstance(event, ScalarEvent):
                    self.fail(here, "a key must be a word; check for brackets or a stray * or ?")
                self._refuse(event)
                name = event.value
                if name in mapping:
                    first = self.line(self.places[(*where, name)].key)
                    self.fail(here, f"the key {quoted(name)} is here twice, first on line {first}; keep one")
                mapping[name] = self._value(next(events), events, (*where, name), here)
            return mapping
        self.places[where] = Place(at, key, "list")
        items: list[Any] = []
        while not isinstance(event := next(events), CollectionEndEvent):
            items.append(self._value(event, events, (*where, len(items)), None))
        return items


def read_bytes(path: Path) -> bytes:
    """The bytes of a file; of a larger file, one byte more than the limit."""
    with path.open("rb") as stream:
        return stream.read(LIMIT + 1)


def scalar(kind: str, raw: str) -> Any:
    """A plain scalar as a Python value; a number with too many digits stays a text."""
    if kind == "nothing":
        return None
    if kind == "truth value":
        return raw.lower() == "true"
    if kind == "number":
        for convert in (int, float):
            try:
                return convert(re.sub(r"\.(inf|nan)$", r"\1", raw.lower()))
            except ValueError:
                continue
    return raw


def with_article(kind: str) -> str:
    return kind if kind in ("text", "nothing") else f"a {kind}"


def fail(file: str, line: int, message: str) -> NoReturn:
    raise InputError(" ".join(f"{file}:{line}: {message}".split("\n")))


def assignment(text: str) -> tuple[str, Any]:
    """KEY=VALUE, the value as YAML."""
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise InputError(f'--set "{text}": expected KEY=VALUE, such as ppo.updates=4')
    return key.strip(), YamlText(f"--set {key.strip()}", value, what="setting").read(mapping=False)
