"""Sphinx: `make docs` writes the pages of this folder as HTML to docs/_build."""

from importlib.metadata import version as version_of

project = "Solon"
author = "The Solon developers"
copyright = "2026, The Solon developers"
version = release = version_of("solon")
extensions = ["myst_parser"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "Solon"
html_show_sourcelink = False
myst_heading_anchors = 4  # a link to a heading, as GitHub makes its anchors
