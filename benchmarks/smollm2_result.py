"""What came out of benchmarks/learns_smollm2.py, from its folder: result.json, table.md, result.png. Whatever is absent is left out."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from eval import facts, rewards, runs

SFT, TRAINERS = "sft", ("sft", "reward", "rlhf", "grpo", "dpo")
COLOURS = {"ppo-seed-0": "#1f5fa8", "ppo-seed-1": "#4f8fd0", "ppo-seed-2": "#8dbbe8", "ppo-kl-low": "#c8471b", "ppo-kl-high": "#7a5195",
           "grpo": "#2f8f5b", "dpo": "#8a8a8a"}
CURVES = (("reward", "reward on training prompts"), ("kl", "KL to SFT, nats a reply"), ("response_length", "reply length, tokens"),
          ("entropy", "entropy, nats a token"), ("eos_rate", "share of replies that end"))


def collect(folder: Path, branches: Sequence[str]) -> dict:
    """{"stages": [{"run", "stage", "seconds", "gpu_gb", "iterations"}], "language", "preference", "policies": {name: {...}}, "curves":
    {branch: {name: [[iteration, value], ...]}}}."""
    names = [name for name in ("base", "judge", "full", *branches) if (folder / name / "config.json").is_file()]
    found = {name: runs.collect(folder / name) for name in names}
    stages = [{"run": name, "stage": row["name"], "seconds": row["seconds"], "gpu_gb": row["memory_gb"], "iterations": row["iterations"]}
              for name, run in found.items() for row in facts.stage_rows(run) if row["seconds"] is not None]
    preference = {f"{name} {stage}": row for name, run in found.items() if name in ("base", "judge", "full", "dpo")
                  for stage, row in rewards.summary({one.name: one.folder for one in run.stages}).items()}
    curves = {name: _curves(found[name]) for name in branches if name in found}
    return {"stages": stages, "language": facts.language_models(found["base"]) if "base" in found else {}, "preference": preference,
            "policies": _policies(folder, branches), "curves": curves}


def _curves(run: runs.Run) -> dict[str, list[list[float]]]:
    """Every number of the policy's trainer, and the reward models' scores of its replies."""
    made: dict[str, dict[int, float]] = {}
    for stage in run.stages:
        if stage.name in TRAINERS[2:]:
            for row in stage.metrics:
                for name, value in row.items():
                    if isinstance(value, int | float) and name not in ("iteration", "total", "time"):
                        made.setdefault(name, {})[row["iteration"]] = value
    return {name: [[at, values[at]] for at in sorted(values)] for name, values in made.items()}


def _policies(folder: Path, branches: Sequence[str]) -> dict[str, dict]:
    """Model -> {"score", "win_rate", "kl" (intervals), "heldout", "questions" (checks)} from each branch's evaluation."""
    made: dict[str, dict] = {}
    for branch in branches:
        results = runs.read_json(folder / "evaluation" / branch / "results.json")
        for name in (SFT, branch) if results else ():
            made.setdefault(name, {key: results["heldout"][key].get(name) for key in ("score", "win_rate", "kl")}
                            | {source: results["checks"][source].get(name) for source in ("heldout", "questions")})
    return made


def interval(value: Mapping | None, form: str = ".3f") -> str:
    return "-" if value is None else f"{value['mean']:{form}} [{value['low']:{form}}, {value['high']:{form}}]"


def tables(result: Mapping) -> str:
    """Markdown: the stages, the preference models, the policies."""
    lines = ["| run | stage | iterations | seconds | GPU, GB |", "|---|---|---|---|---|"]
    lines += [f"| {row['run']} | {row['stage']} | {row['iterations'] or ''} | {row['seconds']:.0f} | "
              f"{'' if row['gpu_gb'] is None else format(row['gpu_gb'], '.1f')} |" for row in result["stages"]]
    lines += ["", "| held-out pairs | accuracy | shorter wins |", "|---|---|---|"]
    lines += [f"| {name} | {interval({'mean': row['accuracy'], 'low': row['low'], 'high': row['high']})} | "
              f"{row['floors'].get('shorter wins', math.nan):.3f} |" for name, row in result["preference"].items()]
    lines += ["", "| model | preferred to SFT by the judge | its score | KL to SFT, nats a reply | own reward model: first, last | "
              "tokens | EOS | repeated 4-grams | distinct-2 | MT-Bench answers: tokens | EOS | repeated 4-grams | distinct-2 |",
              "|---|---|---|---|---|---|---|---|---|---|---|---|---|"]
    for name, row in result["policies"].items():
        own = result["curves"].get(name, {}).get("score_own", [])
        ends = f"{own[0][1]:.3f}, {own[-1][1]:.3f}" if own else "-"
        said, asked = row["heldout"], row["questions"]
        checked = [f"{one['tokens']:.1f} | {one['eos_rate']:.2f} | {one['repeated_ngrams']:.3f} | {one['distinct_2']:.2f}"
                   for one in (said, asked)]
        lines.append(f"| {name} | {interval(row['win_rate'])} | {interval(row['score'])} | {interval(row['kl'], '.2f')} | {ends} | "
                     f"{' | '.join(checked)} |")
    return "\n".join(lines)


def picture(result: Mapping, path: Path) -> None:
    """The frontier, the two reward models on the way, win rates, and the curves of training."""
    figure = Figure(figsize=(13, 6), dpi=90, layout="constrained")
    (frontier, apart, wins, reward), rest = figure.subplots(2, 4)
    panels = [reward, *rest]
    for name, curves in result["curves"].items():
        colour = COLOURS.get(name, "black")
        own, other = (dict(map(tuple, curves.get(f"score_{model}", []))) for model in ("own", "other"))
        kl = dict(map(tuple, curves.get("heldout_kl", [])))
        at = [iteration for iteration in own if iteration in kl or iteration == 0]
        if at:
            frontier.plot([kl.get(iteration, 0.0) for iteration in at], [other[iteration] - other[at[0]] for iteration in at], color=colour,
                          marker="o", markersize=3, label=name)
            apart.plot(at, [own[iteration] - own[at[0]] for iteration in at], color=colour, linestyle="--", linewidth=1)
            apart.plot(at, [other[iteration] - other[at[0]] for iteration in at], color=colour)
        for panel, (key, _) in zip(panels, CURVES, strict=True):
            if key in curves:
                panel.plot(*zip(*curves[key], strict=True), color=colour, linewidth=1.2)
    _titles(frontier, "held-out score by the judge over KL", "KL to SFT, nats a reply")
    _titles(apart, "own reward model (dashed) and judge", "iteration")
    for panel, (_, title) in zip(panels, CURVES, strict=True):
        _titles(panel, title, "iteration")
    rated = {name: row["win_rate"] for name, row in result["policies"].items() if row["win_rate"]}
    for place, (name, value) in enumerate(rated.items()):
        wins.plot([value["low"], value["high"]], [place, place], color=COLOURS.get(name, "black"), linewidth=3, alpha=0.5)
        wins.plot([value["mean"]], [place], color=COLOURS.get(name, "black"), marker="o")
    wins.axvline(0.5, color="#999999", linewidth=1)
    wins.set_yticks(range(len(rated)), list(rated))
    wins.invert_yaxis()
    _titles(wins, "preferred to SFT by the judge, 95%", "share of the held-out prompts")
    if frontier.lines:
        frontier.legend(fontsize=7, frameon=False)
    figure.savefig(path)


def _titles(axes, title: str, below: str) -> None:
    axes.set_title(title, fontsize=9, loc="left")
    axes.set_xlabel(below, fontsize=8)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def write(folder: Path, branches: Sequence[str], done: Mapping[str, bool]) -> str:
    """Write the three files; the tables."""
    result = collect(folder, branches) | {"done": dict(done)}
    (folder / "result.json").write_text(json.dumps(result) + "\n", encoding="utf-8")
    (folder / "table.md").write_text(tables(result) + "\n", encoding="utf-8")
    picture(result, folder / "result.png")
    return tables(result)
