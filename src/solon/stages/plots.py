"""Plots of the report, as inline SVG: drawn by matplotlib, with no script, no request and no time of drawing.

The same data gives the same bytes. Lines and letters take the page's own colour, so that a plot can be read in light
and in dark; a screen reader is told what is to be seen, and the numbers stand in a table beside it.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK = "#010203"  # stands for the page's own colour while matplotlib draws
MARK = "#3b82c4"  # 4.0 : 1 and more against the report's light and dark grounds (WCAG 2.2 asks 3 : 1 of graphics)


def reliability(bins: Sequence[dict[str, Any]], name: str) -> str:
    """Share right over confidence, bin by bin, with 95 % intervals, over a bar of pairs per bin.

    bins: those of `feedback.calibration.bins`. name: unlike that of every other plot on the page.
    """
    from matplotlib.figure import Figure  # takes half a second, and only a report needs it

    figure = Figure(figsize=(4.6, 4.4), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    x = [b["confidence"] for b in bins]
    y, low, high = ([b["right"][key] for b in bins] for key in ("value", "low", "high"))
    reach = [[v - a for v, a in zip(y, low, strict=True)], [b - v for v, b in zip(y, high, strict=True)]]
    above.plot([0.5, 1], [0.5, 1], color=INK, linewidth=1, linestyle="--", alpha=0.6, clip_on=False)
    above.errorbar(x, y, yerr=reach, fmt="o", color=MARK, markersize=5, capsize=3, clip_on=False)
    above.set(xlim=(0.5, 1), ylim=(0, 1), ylabel="share right")
    below.bar(
        [b["low"] for b in bins],
        [b["right"]["n"] for b in bins],
        width=[0.92 * (b["high"] - b["low"]) for b in bins],
        align="edge",
        color=MARK,
        clip_on=False,
    )
    below.set(xlabel="confidence of the judge", ylabel="pairs")
    points = "; ".join(
        f"confidence {b['confidence']:.2f}: {100 * b['right']['value']:.0f} % right of {b['right']['n']}" for b in bins
    )
    return _svg(
        figure,
        name,
        "Reliability diagram: how often the judge is right, by how sure it is",
        f"On the dashed diagonal confidence and share right are equal; below it the judge is too sure. {points}.",
    )


def _svg(figure: Figure, name: str, title: str, description: str) -> str:
    """A figure as an <svg> element to stand inside a page, with its words for who cannot see it."""
    import matplotlib

    for axes in figure.axes:
        axes.tick_params(colors=INK)
        axes.xaxis.label.set_color(INK)
        axes.yaxis.label.set_color(INK)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[:].set_color(INK)
    out = io.StringIO()
    # hashsalt names what the plot repeats, such as its markers: the same every time, and unlike another plot's.
    # fonttype none: letters stay letters.
    with matplotlib.rc_context({"svg.hashsalt": name, "svg.fonttype": "none"}):
        figure.savefig(out, format="svg", transparent=True)
    # what is cut off: XML's, the time of drawing, and a style that would be every plot's of the page
    head, _, body = out.getvalue().partition("</defs>")
    box = re.search(r'viewBox="[^"]*"', head)
    assert box is not None
    body = re.sub(r'<g id="[^"]*">', "<g>", body)
    body = re.sub(r"font-family: [^;]*; ", "", body)  # the page's own
    body = body.replace(INK, "currentColor")
    return (
        f'<svg class="plot" {box[0]} role="img" aria-labelledby="{name}-title {name}-description">'
        f'<title id="{name}-title">{escape(title)}</title>'
        f'<desc id="{name}-description">{escape(description)}</desc>{body}'
    )
