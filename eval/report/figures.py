"""Pictures of the report: SVG to stand inside HTML, byte-identical for the same numbers, in the
page's own colours and font."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from eval.files import foreign
from eval.files.foreign import fits, plain, whole_number

POINTS = 300
"""Most points of a drawn curve; a longer one is averaged over neighbours."""
_LONGEST = 48
"""Characters of a name beside an axis."""
matplotlib.rcParams["text.parse_math"] = False  # a model may be called m$\frac{$
_INK, _LINE = "#010203", "#010204"
_SERIES = ("#010210", "#010211", "#010212", "#010213", "#010214")
_VARIABLES = {_INK: "var(--muted)", _LINE: "var(--line)"} | {colour: f"var(--s{i})" for i, colour in enumerate(_SERIES)}
"""Stand-in colours that matplotlib draws with -> the page's, so that a figure follows light and
dark."""

RADAR_AXES = ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities")
"""Clockwise from the top."""


def curve(rows: Sequence[Mapping], name: str) -> tuple[list[float], list[float]]:
    """(iterations, values) of ``name`` in metrics rows; a resumed run repeats iterations, and its
    last value counts."""
    points = {
        row["iteration"]: row[name]
        for row in rows
        if fits(row.get(name), foreign.number) and fits(row.get("iteration"), whole_number)
    }
    places = sorted(points)
    group = -(-len(places) // POINTS) or 1
    groups = [places[i : i + group] for i in range(0, len(places), group)]
    return [sum(g) / len(g) for g in groups], [sum(points[i] for i in g) / len(g) for g in groups]


@dataclass(frozen=True)
class Curve:
    label: str
    x: list[float]
    y: list[float]
    colour: int
    """Number of the page's series colour."""
    dashed: bool = False


def panel_svg(name: str, curves: Sequence[Curve], level: float | None = None) -> str:
    """Curves over iterations, and a dashed level; ``name`` is unique on the page."""
    figure, axes = _axes((3.4, 2.1))
    for drawn in curves:
        few = len(drawn.x) <= 12
        axes.plot(
            drawn.x,
            drawn.y,
            color=_SERIES[drawn.colour % len(_SERIES)],
            linewidth=1.6,
            linestyle="--" if drawn.dashed else "-",
            marker="o" if few else None,
            markersize=3,
        )
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    if level is not None:
        axes.axhline(level, color=_INK, linewidth=1, linestyle=(0, (1, 2)))
    return _svg(figure, name)


def frontier_svg(name: str, paths: Sequence[Curve], labels: tuple[str, str]) -> str:
    """Reward over KL, a dot a checkpoint, joined in the order of training; the last one is larger.
    ``labels``: of the two axes."""
    figure, axes = _axes((3.9, 2.2))
    for path in paths:
        colour = _SERIES[path.colour % len(_SERIES)]
        axes.plot(path.x, path.y, color=colour, linewidth=1.1, alpha=0.6, marker="o", markersize=3)
        axes.plot(path.x[-1:], path.y[-1:], color=colour, marker="o", markersize=7)
    axes.set_xlabel(labels[0], color=_INK, fontsize=8)
    axes.set_ylabel(labels[1], color=_INK, fontsize=8)
    return _svg(figure, name)


def calibration_svg(name: str, stages: Mapping[str, Mapping[str, float]]) -> str:
    """Stage -> lower edge of a bin of confidence -> accuracy in it, beside the diagonal of perfect
    calibration."""
    figure, axes = _axes((3.9, 2.2))
    axes.plot([0.5, 1], [0.5, 1], color=_LINE, linewidth=1)
    for number, bins in enumerate(stages.values()):
        edges = sorted(bins, key=float)
        axes.plot(
            [float(edge) + 0.05 for edge in edges],
            [bins[edge] for edge in edges],
            color=_SERIES[number % len(_SERIES)],
            linewidth=1.4,
            marker="o",
            markersize=4,
        )
    axes.set_xlabel("confidence", color=_INK, fontsize=8)
    axes.set_xlim(0.5, 1)
    return _svg(figure, name)


def interval_svg(values: Mapping[str, Mapping], name: str) -> str:
    """One row a model: a dot at the mean, a bar over its 95% interval. ``values``: model ->
    {"mean", "low", "high"}."""
    figure, axes = _axes((4.2, 0.45 + 0.32 * len(values)))
    for number, value in enumerate(values.values()):
        colour = _SERIES[number % len(_SERIES)]
        axes.plot(
            [value["low"], value["high"]],
            [number, number],
            color=colour,
            linewidth=3.5,
            alpha=0.45,
            solid_capstyle="round",
        )
        axes.plot([value["mean"]], [number], color=colour, marker="o", markersize=6)
    axes.set_yticks(range(len(values)), [_shown(model) for model in values])
    axes.set_ylim(len(values) - 0.5, -0.5)
    axes.grid(axis="y", visible=False)
    return _svg(figure, name)


def radar_svg(means: Mapping[str, Mapping[str, float]], name: str = "radar") -> str:
    """Model -> category -> mean rating, 0..10 on eight axes; a category without a rating breaks no
    line but has no point."""
    figure = Figure(figsize=(4.2, 3.3))
    # room for the longest name of a category
    axes = figure.add_axes((0.22, 0.12, 0.56, 0.76), projection="polar")
    axes.set_theta_zero_location("N")
    axes.set_theta_direction(-1)
    angles = [2 * math.pi * i / len(RADAR_AXES) for i in range(len(RADAR_AXES))]
    for number, values in enumerate(means.values()):
        points = [(angle, values[axis]) for angle, axis in zip(angles, RADAR_AXES, strict=True) if axis in values]
        x, y = zip(*(points + points[:1]), strict=True)
        axes.plot(x, y, color=_SERIES[number % len(_SERIES)], linewidth=1.8)
        axes.fill(x, y, color=_SERIES[number % len(_SERIES)], alpha=0.12)
    axes.set_xticks(angles, [axis.upper() if axis == "stem" else axis.capitalize() for axis in RADAR_AXES])
    axes.set_ylim(0, 10)
    axes.set_yticks([2, 4, 6, 8, 10])
    axes.grid(color=_LINE)
    axes.spines["polar"].set_color(_LINE)
    axes.tick_params(colors=_INK, labelsize=8, pad=11)
    axes.patch.set_visible(False)
    return _svg(figure, name)


def _shown(model: str) -> str:
    """A model's name beside an axis."""
    name = " ".join(plain(model).split())
    return name if len(name) <= _LONGEST else f"{name[: _LONGEST - 3]}..."


def _axes(size: tuple[float, float]):
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.add_subplot()
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(_LINE)
    axes.grid(axis="y", color=_LINE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=_INK, labelsize=8, length=0)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=False))
    axes.yaxis.set_major_locator(MaxNLocator(4))
    axes.patch.set_visible(False)
    return figure, axes


def _svg(figure: Figure, name: str) -> str:
    """The figure as an <svg> element without size, metadata, fonts of its own, or ids that another
    figure might have."""
    name = re.sub(r"[^\w-]", "-", name)
    figure.patch.set_visible(False)
    text = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = (
        re.sub(r'\s(xmlns(:xlink)?|version|(?<=<svg )width|height)="[^"]*"', "", svg.split(">", 1)[0])
        + ">"
        + svg.split(">", 1)[1]
    )
    svg = re.sub(r'width="[\d.]+pt"', "", svg, count=1).replace("xlink:href", "href")
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', svg))
    svg = re.sub(r' id="([^"]+)"', lambda m: f' id="{name}-{m[1]}"' if m[1] in used else "", svg)
    svg = re.sub(r'(href="#|url\(#)', rf"\g<1>{name}-", svg)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, variable)
    return re.sub(r"\n\s*", "\n", svg)
