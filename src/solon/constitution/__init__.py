"""The constitution: the principles a model is trained by, read from YAML, compared and written back."""

from solon.constitution.changes import Change, diff, render_diff
from solon.constitution.check import Check
from solon.constitution.files import builtin_names, inline_check, load_constitution, to_yaml
from solon.constitution.model import Constitution, Example, Principle, draw_principles, of_constitution

__all__ = [
    "Change",
    "Check",
    "Constitution",
    "Example",
    "Principle",
    "builtin_names",
    "diff",
    "draw_principles",
    "inline_check",
    "load_constitution",
    "of_constitution",
    "render_diff",
    "to_yaml",
]
