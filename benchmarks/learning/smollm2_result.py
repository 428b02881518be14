"""The results of benchmarks/learning/learns_smollm2.py, from its folder: result.json, table.md and
result.png. Runs and files that are missing are left out."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from eval.report import reward_accuracy, run_facts, run_folder
from eval.scores import reward_model

SFT, TRAINERS = "sft", ("sft", "reward", "rlhf", "grpo", "dpo")
INTERVALS = ("score", "win_rate", "length_controlled", "kl")
OWN, JUDGE = reward_model.PREFIX + "own", reward_model.PREFIX + "other"
COLOURS = {
    "ppo-seed-0": "#1f5fa8",
    "ppo-seed-1": "#4f8fd0",
    "ppo-seed-2": "#8dbbe8",
    "ppo-kl-low": "#c8471b",
    "ppo-kl-high": "#7a5195",
    "grpo": "#2f8f5b",
    "dpo": "#8a8a8a",
}
CURVES = (
    ("reward", "reward on training prompts"),
    ("kl", "KL to SFT, nats a reply"),
    ("response_length", "reply length, tokens"),
    ("entropy", "entropy, nats a token"),
    ("eos_rate", "share of replies that end"),
    ("different", "share of different replies, held-out"),
    ("sorry", "share of replies that say sorry"),
)


def collect(folder: Path, branches: Sequence[str]) -> dict:
    """{"stages": [{"run", "stage", "seconds", "gpu_gb", "iterations"}], "works": {name: seconds},
    "language", "preference", "policies": {name: {...}}, "coefficients": {branch: {...}}, "curves":
    {branch: {name: [[iteration, value], ...]}}}."""
    names = [name for name in ("base", "judge", "full", *branches) if (folder / name / "config.json").is_file()]
    runs = {name: run_folder.collect(folder / name) for name in names}
    stages = [
        {
            "run": name,
            "stage": row["name"],
            "seconds": row["seconds"],
            "gpu_gb": row["memory_gb"],
            "iterations": row["iterations"],
        }
        for name, run in runs.items()
        for row in run_facts.stage_rows(run)
        if row["seconds"] is not None
    ]
    accuracies = {
        f"{name} {stage}": row
        for name, run in runs.items()
        if name in ("base", "judge", "full", "dpo")
        for stage, row in reward_accuracy.summary({one.name: one.folder for one in run.stages}).items()
    }
    policies = _policies(folder, branches)
    start = run_folder.lines(folder / "evaluation" / SFT / "heldout" / f"{SFT}.jsonl")
    curves = {name: _curves(runs[name], start) for name in branches if name in runs}
    # DPO samples nothing while it trains: its KL is its evaluation's, at its end
    for name in policies.keys() & curves.keys():
        if policies[name]["kl"] and (ends := curves[name].get(OWN)):
            curves[name].setdefault("heldout_kl", [[ends[-1][0], policies[name]["kl"]["mean"]]])
    return {
        "stages": stages,
        "works": _works(folder / "logs" / "works.jsonl"),
        "policies": policies,
        "preference": accuracies,
        "language": run_facts.language_models(runs["base"]) if "base" in runs else {},
        "curves": curves,
        "coefficients": {name: _coefficient(runs[name], curves[name]) for name in curves},
    }


def _works(path: Path) -> dict[str, float]:
    """Name -> seconds. A work that found nothing to do when it was repeated has the seconds of its
    longest try."""
    seconds: dict[str, float] = {}
    for row in run_folder.lines(path):
        if row["done"]:
            seconds[row["name"]] = max(row["seconds"], seconds.get(row["name"], 0.0))
    return seconds


def _coefficient(run: run_folder.Run, curves: Mapping) -> dict[str, float]:
    """{"kl_coef", "group_std" of GRPO's last third} or {"beta"}. kl_coef x group_std is the
    coefficient of GRPO's unscaled reward."""
    trained = {name: run.config[name] for name in TRAINERS[2:] if name in run.config}
    coefficients = {key: table[key] for table in trained.values() for key in ("kl_coef", "beta") if key in table}
    spread = [value for _, value in curves.get("group_std", [])]
    last = spread[-max(1, len(spread) // 3) :]
    return coefficients | ({"group_std": sum(last) / len(last)} if last else {})


def diversity(replies: Sequence[str]) -> dict[str, float]:
    """The share of different replies and of those that say sorry: a policy that collapsed gives one
    reply to every prompt."""
    return {
        "different": len(set(replies)) / len(replies),
        "sorry": sum("sorry" in text.lower() for text in replies) / len(replies),
    }


def _curves(run: run_folder.Run, start: Sequence[Mapping]) -> dict[str, list[list[float]]]:
    """{name: [[iteration, value], ...]} of the policy's trainer: its metrics, and ``diversity`` of
    its replies. ``start``: SFT's replies, which stand at iteration 0."""
    curves: dict[str, dict[int, float]] = {}
    for stage in run.stages:
        if stage.name in TRAINERS[2:]:
            for row in stage.metrics:
                for name, value in row.items():
                    if isinstance(value, int | float) and name not in ("iteration", "total", "time"):
                        curves.setdefault(name, {})[row["iteration"]] = value
            replies_at = defaultdict(list, {0: [row["response"] for row in start]} if start else {})
            for row in run_folder.lines(stage.folder / reward_model.REPLIES):
                replies_at[row["iteration"]].append(row["response"])
            for at, replies in replies_at.items():
                for name, value in diversity(replies).items():
                    curves.setdefault(name, {})[at] = value
    return {name: [[at, values[at]] for at in sorted(values)] for name, values in curves.items()}


def _policies(folder: Path, branches: Sequence[str]) -> dict[str, dict]:
    """Model -> {"score", "win_rate", "length_controlled", "kl" (intervals), "heldout", "questions"
    (checks), "replies", "different", "sorry"} from each branch's evaluation."""
    policies: dict[str, dict] = {}
    for branch in branches:
        results = run_folder.read_json(folder / "evaluation" / branch / "results.json")
        for name in (SFT, branch) if results else ():
            policies.setdefault(
                name,
                {key: results["heldout"].get(key, {}).get(name) for key in INTERVALS}
                | {source: results["checks"][source].get(name) for source in ("heldout", "questions")}
                | _final_diversity(folder / "evaluation" / branch / "heldout" / f"{name}.jsonl"),
            )
    return policies


def _final_diversity(path: Path) -> dict[str, float]:
    replies = [row["response"] for row in run_folder.lines(path)]
    return {"replies": len(replies), **diversity(replies)} if replies else {}


def interval(value: Mapping | None, form: str = ".3f") -> str:
    return "-" if value is None else f"{value['mean']:{form}} [{value['low']:{form}}, {value['high']:{form}}]"


def tables(result: Mapping) -> str:
    """Markdown: the stages, the rest of the works, the preference models, the policies, and how
    they write."""
    lines = ["| run | stage | iterations | seconds | GPU, GB |", "|---|---|---|---|---|"]
    lines += [
        f"| {row['run']} | {row['stage']} | {row['iterations'] or ''} | {row['seconds']:.0f} | "
        f"{'' if row['gpu_gb'] is None else format(row['gpu_gb'], '.1f')} |"
        for row in result["stages"]
    ]
    lines += [
        f"| {name.rpartition('-')[0]} | {name.rpartition('-')[2]} | | {seconds:.0f} | |"
        for name, seconds in result["works"].items()
        if name.endswith(("-evaluated", "-rescored"))
    ]
    lines += ["", "| held-out pairs | accuracy | shorter wins |", "|---|---|---|"]
    lines += [
        f"| {name} | {interval({'mean': row['accuracy'], 'low': row['low'], 'high': row['high']})} | "
        f"{row['floors'].get('shorter wins', math.nan):.3f} |"
        for name, row in result["preference"].items()
    ]
    lines += [
        "",
        "| model | KL coefficient | KL to SFT, nats a reply | own reward model: first, last | the judge's score | "
        "preferred to SFT by the judge | at equal length | tokens | EOS | different replies | say sorry |",
        "|---" * 11 + "|",
    ]
    for name, row in result["policies"].items():
        own, checked = result["curves"].get(name, {}).get(OWN, []), row["heldout"]
        ends = f"{own[0][1]:.3f}, {own[-1][1]:.3f}" if own else "-"
        different = (
            f"{row['different'] * row['replies']:.0f} of {row['replies']} | {row['sorry']:.2f}"
            if "replies" in row
            else "- | -"
        )
        cells = (
            name,
            _weight(result["coefficients"].get(name, {})),
            interval(row["kl"], ".2f"),
            ends,
            *(interval(row[key]) for key in ("score", "win_rate", "length_controlled")),
            f"{checked['tokens']:.1f}",
            f"{checked['eos_rate']:.2f}",
            different,
        )
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "| model | repeated 4-grams | distinct-2 | MT-Bench answers: "
        "tokens | EOS | empty | repeated 4-grams | distinct-2 |",
        "|---" * 8 + "|",
    ]
    for name, row in result["policies"].items():
        heldout, answers = row["heldout"], row["questions"]
        lines.append(
            f"| {name} | {heldout['repeated_ngrams']:.3f} | {heldout['distinct_2']:.2f} | {answers['tokens']:.1f} | "
            f"{answers['eos_rate']:.2f} | {answers['empty']:.2f} | {answers['repeated_ngrams']:.3f} | "
            f"{answers['distinct_2']:.2f} |"
        )
    missing = [name for name, done in result["done"].items() if not done]
    return "\n".join([*lines, *(["", f"Not done: {', '.join(missing)}."] if missing else [])])


def _weight(coefficient: Mapping) -> str:
    """The KL coefficient as a person reads it."""
    if "beta" in coefficient:
        return f"beta {coefficient['beta']:g}"
    spread = f" x {coefficient['group_std']:.2f}" if "group_std" in coefficient else ""
    return f"{coefficient['kl_coef']:g}{spread}" if "kl_coef" in coefficient else "-"


def picture(result: Mapping, path: Path) -> None:
    """Both reward models over KL, win rates, and the curves of training."""
    figure = Figure(figsize=(15, 6.4), dpi=80, layout="constrained")
    (first, second, wins, *top), bottom = figure.subplots(2, 5)
    for name, curves in result["curves"].items():
        colour, label = COLOURS.get(name, "black"), f"{name} ({_weight(result['coefficients'][name])})"
        _frontier(first, curves, OWN, colour, label)
        _frontier(second, curves, JUDGE, colour, label)
        for panel, (key, _) in zip([*bottom, *top], CURVES, strict=True):
            if key in curves:
                panel.plot(
                    *zip(*curves[key], strict=True),
                    color=colour,
                    linewidth=1.2,
                    marker="o" if len(curves[key]) < 3 else None,
                    markersize=3,
                )
    _titles(first, "own reward model's score, held-out", "KL to SFT, nats a reply")
    _titles(second, "the judge's score of the same replies", "KL to SFT, nats a reply")
    for panel, (_, title) in zip([*bottom, *top], CURVES, strict=True):
        _titles(panel, title, "iteration")
    rated = {name: row["win_rate"] for name, row in result["policies"].items() if row["win_rate"]}
    for place, (name, value) in enumerate(rated.items()):
        colour = COLOURS.get(name, "black")
        wins.plot([value["low"], value["high"]], [place, place], color=colour, linewidth=3, alpha=0.5)
        wins.plot([value["mean"]], [place], color=colour, marker="o")
        if equal := result["policies"][name]["length_controlled"]:
            wins.plot([equal["low"], equal["high"]], [place + 0.3] * 2, color=colour, linewidth=1)
            wins.plot([equal["mean"]], [place + 0.3], color=colour, marker="o", markerfacecolor="white")
    wins.axvline(0.5, color="#999999", linewidth=1)
    wins.set_yticks(range(len(rated)), list(rated))
    wins.invert_yaxis()
    _titles(wins, "preferred to SFT by the judge", "share of prompts, 95%; hollow: at equal length")
    if first.lines:
        figure.legend(
            *first.get_legend_handles_labels(), loc="outside lower center", ncols=7, fontsize=8, frameon=False
        )
    figure.savefig(path)


def _frontier(panel: Axes, curves: Mapping, key: str, colour: str, label: str) -> None:
    """The path from SFT (KL 0) through the iterations whose replies were scored, its end marked."""
    scores, kl = (dict(map(tuple, curves.get(name, []))) for name in (key, "heldout_kl"))
    at = [iteration for iteration in scores if iteration in kl or iteration == 0]
    if not at:
        return
    x, y = [kl.get(iteration, 0.0) for iteration in at], [scores[iteration] for iteration in at]
    panel.plot(x, y, color=colour, marker=".", markersize=4, linewidth=1, alpha=0.6)
    panel.plot(x[-1:], y[-1:], color=colour, marker="o", markersize=8, linestyle="none", label=label)


def _titles(axes: Axes, title: str, below: str) -> None:
    axes.set_title(title, fontsize=9, loc="left")
    axes.set_xlabel(below, fontsize=8)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def write(folder: Path, branches: Sequence[str], done: Mapping[str, bool]) -> str:
    """Write the three files; the tables as text."""
    result = collect(folder, branches) | {"done": dict(done)}
    (folder / "result.json").write_text(json.dumps(result) + "\n", encoding="utf-8")
    (folder / "table.md").write_text(tables(result) + "\n", encoding="utf-8")
    picture(result, folder / "result.png")
    return tables(result)
