"""Pictures of the report: SVG to stand inside HTML, byte-identical for the same numbers, in the page's own colours and font."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

POINTS = 300
"""Most points of a drawn curve; a longer one is averaged over neighbours."""
_INK, _LINE = "#010203", "#010204"
_SERIES = ("#010210", "#010211", "#010212", "#010213", "#010214")
_VARIABLES = {_INK: "var(--muted)", _LINE: "var(--line)"} | {colour: f"var(--s{i})" for i, colour in enumerate(_SERIES)}
"""Stand-in colours that matplotlib draws with -> the page's, so that a figure follows light and dark."""

RADAR_AXES = ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities")
"""Clockwise from the top."""


@dataclass(frozen=True)
class Panel:
    stage: str
    title: str
    series: tuple[tuple[str, str], ...]
    """(name in metrics.jsonl, label)."""
    level: str = ""
    """Name whose last value is drawn as a dashed level."""


PANELS = (
    Panel("sft", "Loss, nats a token", (("loss", "training"), ("heldout_loss", "held out")), "unigram_entropy"),
    Panel("reward", "Accuracy", (("accuracy", "training"), ("heldout_accuracy", "held out")), "shorter_wins"),
    Panel("reward", "Margin, chosen minus rejected", (("margin", "training"), ("heldout_margin", "held out"))),
    Panel("rlhf", "Reward, mean score", (("reward", "reward"),)),
    Panel("rlhf", "KL to SFT, nats a response", (("kl", "KL"),)),
    Panel("rlhf", "Entropy, nats a token", (("entropy", "entropy"),)),
    Panel("rlhf", "Response length, tokens", (("response_length", "length"),)),
    Panel("rlhf", "Shares of responses", (("eos_rate", "ended by EOS"), ("repeated_ngrams", "repeated n-grams"))),
    Panel("rlhf", "Value model, explained variance", (("explained_variance", "explained variance"),)),
    Panel("rlhf", "Policy update", (("clip_fraction", "clip fraction"), ("approx_kl", "approximate KL"))),
    Panel("rlhf", "Seconds an iteration", (("seconds_generate", "generate"), ("seconds_score", "score"), ("seconds_update", "update"))),
)


def curve(rows: Sequence[Mapping], name: str) -> tuple[list[float], list[float]]:
    """(iterations, values) of ``name`` in metrics rows; a resumed run repeats iterations, and its last value counts."""
    points = {row["iteration"]: row[name] for row in rows
              if isinstance(row.get(name), int | float) and math.isfinite(row[name]) and isinstance(row.get("iteration"), int)}
    places = sorted(points)
    group = -(-len(places) // POINTS) or 1
    groups = [places[i:i + group] for i in range(0, len(places), group)]
    return [sum(g) / len(g) for g in groups], [sum(points[i] for i in g) / len(g) for g in groups]


def panel_svg(panel: Panel, rows: Sequence[Mapping]) -> tuple[str, list[str], str] | None:
    """(SVG, labels of the drawn curves in the order of their colours, label of the dashed level or ""); None without a curve."""
    curves = [(label, *curve(rows, name)) for name, label in panel.series]
    curves = [(label, x, y) for label, x, y in curves if x]
    if not curves:
        return None
    figure, axes = _axes((3.4, 2.1))
    for number, (_, x, y) in enumerate(curves):
        axes.plot(x, y, color=_SERIES[number], linewidth=1.6, marker="o" if len(x) <= 12 else None, markersize=3)
    level = curve(rows, panel.level)[1] if panel.level else []
    if level:
        axes.axhline(level[-1], color=_INK, linewidth=1, linestyle=(0, (4, 3)))
    svg = _svg(figure, f"{panel.stage}-{panel.series[0][0]}")
    return svg, [label for label, _, _ in curves], panel.level.replace("_", " ") if level else ""


def interval_svg(values: Mapping[str, Mapping], name: str) -> str:
    """One row a model: a dot at the mean, a bar over its 95% interval. ``values``: model -> {"mean", "low", "high"}."""
    figure, axes = _axes((4.2, 0.45 + 0.32 * len(values)))
    for number, value in enumerate(values.values()):
        colour = _SERIES[number % len(_SERIES)]
        axes.plot([value["low"], value["high"]], [number, number], color=colour, linewidth=3.5, alpha=0.45, solid_capstyle="round")
        axes.plot([value["mean"]], [number], color=colour, marker="o", markersize=6)
    axes.set_yticks(range(len(values)), list(values))
    axes.set_ylim(len(values) - 0.5, -0.5)
    axes.grid(axis="y", visible=False)
    return _svg(figure, name)


def radar_svg(means: Mapping[str, Mapping[str, float]]) -> str:
    """Model -> category -> mean rating, 0..10 on eight axes; a category without a rating breaks no line but has no point."""
    figure = Figure(figsize=(4.6, 3.9))
    axes = figure.add_subplot(projection="polar")
    axes.set_theta_zero_location("N")
    axes.set_theta_direction(-1)
    angles = [2 * math.pi * i / len(RADAR_AXES) for i in range(len(RADAR_AXES))]
    for number, (model, values) in enumerate(means.items()):
        points = [(angle, values[axis]) for angle, axis in zip(angles, RADAR_AXES, strict=True) if axis in values]
        x, y = zip(*(points + points[:1]), strict=True)
        axes.plot(x, y, color=_SERIES[number % len(_SERIES)], linewidth=1.8, label=model)
        axes.fill(x, y, color=_SERIES[number % len(_SERIES)], alpha=0.12)
    axes.set_xticks(angles, [axis.upper() if axis == "stem" else axis.capitalize() for axis in RADAR_AXES])
    axes.set_ylim(0, 10)
    axes.set_yticks([2, 4, 6, 8, 10])
    axes.grid(color=_LINE)
    axes.spines["polar"].set_color(_LINE)
    axes.tick_params(colors=_INK, labelsize=8, pad=11)
    axes.patch.set_visible(False)
    axes.legend(frameon=False, fontsize=8, labelcolor=_INK, loc="upper left", bbox_to_anchor=(1.02, 1.1))
    return _svg(figure, "radar")


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
    """The figure as an <svg> element without size, metadata, fonts of its own, or ids that another figure might have."""
    figure.patch.set_visible(False)
    text = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    svg = text.getvalue()
    svg = svg[svg.index("<svg"):]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\s(xmlns(:xlink)?|version|(?<=<svg )width|height)="[^"]*"', "", svg.split(">", 1)[0]) + ">" + svg.split(">", 1)[1]
    svg = re.sub(r'width="[\d.]+pt"', "", svg, count=1).replace("xlink:href", "href")
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', svg))
    svg = re.sub(r' id="([^"]+)"', lambda m: f' id="{name}-{m[1]}"' if m[1] in used else "", svg)
    svg = re.sub(r'(href="#|url\(#)', rf"\g<1>{name}-", svg)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, variable)
    return re.sub(r"\n\s*", "\n", svg)
