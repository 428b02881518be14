"""Which numbers of a stage are drawn together. Names decide, not stages: one that this file has
never heard of gets its curves, too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from markupsafe import Markup

from eval.files import foreign
from eval.report import figures
from eval.report.figures import Curve, curve

NOT_DRAWN = ("iteration", "total", "time")
HELDOUT = "heldout_"
TOGETHER = (
    ("Loss, nats", ("loss",), "unigram_entropy"),
    ("Accuracy", ("accuracy",), "shorter_wins"),
    ("Margin, chosen less rejected", ("margin",), ""),
    ("Reward, mean score", ("reward",), ""),
    ("KL to the reference, nats a response", ("kl",), ""),
    ("Entropy, nats a token", ("entropy",), ""),
    ("Response length, tokens", ("response_length",), ""),
    ("Shares of responses", ("eos_rate", "repeated_ngrams"), ""),
    ("Value model, explained variance", ("explained_variance",), ""),
    ("Policy update", ("clip_fraction", "approx_kl"), ""),
    ("Gradient norm", ("grad_norm", "value_grad_norm"), ""),
    ("Tokens a second", ("tokens_per_second",), ""),
)
"""Title, names in metrics.jsonl (each with its held-out twin, drawn dashed), name whose last value
is a level. All other numbers follow behind them, each in a panel of its own."""
SECONDS, TOKENS, MEMORY = "seconds_", "tokens_per_second_", "peak_gb_"
PHASES = (
    ("Held-out replies by reward model", "score_"),
    ("Seconds of a phase", SECONDS),
    ("Tokens a second of a phase", TOKENS),
    ("Peak memory of a rank in a phase, GB", MEMORY),
)
"""Title, beginning of the names of numbers that an iteration's phases, or several reward models,
share; those of one kind are drawn together."""


def panels(stage: str, runs: Mapping[str, Sequence[Mapping]]) -> tuple[list[dict], list[dict]]:
    """(main panels, the others) of one stage: {"title", "svg", "labels": [(text, colour, dashed)],
    "level"}. ``runs``: run -> rows."""
    names = list(
        dict.fromkeys(
            name
            for rows in runs.values()
            for row in rows
            for name, value in row.items()
            if name not in NOT_DRAWN and isinstance(value, int | float) and not isinstance(value, bool)
        )
    )
    groups = [
        (title, [name for base in bases for name in (base, HELDOUT + base) if name in names], level)
        for title, bases, level in TOGETHER
    ]
    groups += [(title, [name for name in names if name.startswith(start)], "") for title, start in PHASES]
    drawn = {name for _, members, _ in groups for name in members} | {level for _, _, level in TOGETHER}
    rest = [name for name in names if name not in drawn and not _is_detail(name, names)]
    bases = [name for name in rest if not (name.startswith(HELDOUT) and name.removeprefix(HELDOUT) in rest)]
    others = [(name.replace("_", " "), [one for one in (name, HELDOUT + name) if one in rest], "") for name in bases]
    main = [panel for group in groups if (panel := _panel(stage, runs, *group))]
    more = [panel for group in others if (panel := _panel(stage, runs, *group))]
    return (main, more) if main else (more, [])


def _is_detail(name: str, names: Sequence[str]) -> bool:
    """Edges of an interval and bins of a calibration: the report shows them elsewhere."""
    return (
        any(name.endswith(end) and name.removesuffix(end) in names for end in ("_low", "_high"))
        or "_accuracy_at_" in name
    )


def _panel(
    stage: str, runs: Mapping[str, Sequence[Mapping]], title: str, members: Sequence[str], level: str
) -> dict | None:
    several = len(runs) > 1
    curves = []
    for number, (run, rows) in enumerate(runs.items()):
        for place, name in enumerate(members):
            x, y = curve(rows, name)
            if len(x) > 1:
                label = _label(name, members)
                curves.append(
                    Curve(
                        ", ".join(filter(None, (run if several else "", label))) or name,
                        x,
                        y,
                        number if several else place,
                        several and place > 0,
                    )
                )
    if not curves:
        return None
    levels = [values[-1] for rows in runs.values() if level and (values := curve(rows, level)[1])]
    return {
        "title": title,
        "svg": Markup(figures.panel_svg(f"{stage}-{members[0]}", curves, levels[0] if levels else None)),
        "labels": [(one.label, one.colour, one.dashed) for one in curves],
        "level": level.replace("_", " ") if levels else "",
    }


def _label(name: str, members: Sequence[str]) -> str:
    """ "training" and "held out" for a number and its twin, else the name in words; "" where there
    is only one."""
    bases = {member.removeprefix(HELDOUT) for member in members}
    if len(bases) == 1:
        return "" if len(members) == 1 else "held out" if name.startswith(HELDOUT) else "training"
    for _, start in PHASES:
        name = name.removeprefix(start)
    return name.replace("_", " ").replace("heldout ", "held-out ")


def frontiers(runs: Mapping[str, Mapping[str, Sequence[Mapping]]]) -> dict | None:
    """Reward over KL of every stage that measured both, at its checkpoints where it measured them
    on held-out prompts: {"svg", "labels", "heldout"}; None where none did. ``runs``: run -> stage
    -> rows."""
    for prefix in (HELDOUT, ""):
        paths = []
        for run, stages in runs.items():
            for stage, rows in stages.items():
                points = [
                    (row[prefix + "kl"], row[prefix + "reward"])
                    for row in rows
                    if all(foreign.fits(row.get(prefix + name), foreign.number) for name in ("kl", "reward"))
                ]
                if len(points) > 1:
                    x, y = map(list, zip(*points, strict=True))
                    paths.append(Curve(stage if len(runs) == 1 else f"{run}, {stage}", x, y, len(paths)))
        if paths:
            what = "held-out prompts" if prefix else "training prompts"
            svg = figures.frontier_svg("frontier", paths, ("KL to the reference, nats a response", f"reward, {what}"))
            return {
                "svg": Markup(svg),
                "labels": [(one.label, one.colour, False) for one in paths],
                "heldout": bool(prefix),
            }
    return None
