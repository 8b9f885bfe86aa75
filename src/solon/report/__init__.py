"""The report of a finished run: every number with its interval and sample size, and what was not measured.

`data` gathers a run directory into one dict; `render` writes that dict as Markdown, HTML or a terminal table.
"""

from solon.report.render import render_html, render_markdown, summary_table

__all__ = ["render_html", "render_markdown", "summary_table"]
