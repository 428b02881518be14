"""One self-contained HTML page about a run: no script, no address to load from, every text escaped."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from eval import figures, tables
from eval.questions import QuestionSet

SAMPLES = 12
"""Held-out prompts whose replies are shown, evenly spaced over the file."""

CHECKS = (
    ("texts", "Texts", "d", "Texts that were checked."),
    ("empty", "Empty", "%", "Share of texts with nothing but white space."),
    ("truncated", "Truncated", "%", "Share cut at the limit of new tokens."),
    ("eos_rate", "Ended by EOS", "%", "Share that the model ended with its end-of-sequence token."),
    ("role_markers", "Role markers", "%", "Share that speaks for a role, or was stopped as it began to."),
    ("repeated_ngrams", "Repeated 4-grams", "%", "Mean share of a text's word 4-grams that occurred in it before."),
    ("distinct_1", "Distinct-1", ".2f", "Different words over all words of all texts."),
    ("distinct_2", "Distinct-2", ".2f", "Different word pairs over all word pairs of all texts."),
    ("words", "Words", ".1f", "Mean words of a text."),
    ("tokens", "Tokens", ".1f", "Mean generated tokens of a text."),
)
"""Measure, column, format, meaning."""


def stage_metrics(folder: str | Path) -> list[dict]:
    """Rows of a stage's metrics.jsonl; none where it is absent. A line torn by a kill is left out: the curve loses a point."""
    path = Path(folder) / "metrics.jsonl"
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else ():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def last(rows: Sequence[Mapping], name: str) -> float | None:
    """The last value of ``name``."""
    return next((row[name] for row in reversed(rows) if name in row), None)


def reward_model(rows: Sequence[Mapping]) -> dict | None:
    """Held-out accuracy with its 95% interval, the margin and the "shorter reply wins" floor, from the last evaluation."""
    evaluated = [row for row in rows if "heldout_accuracy" in row]
    names = ("heldout_accuracy", "heldout_accuracy_low", "heldout_accuracy_high", "heldout_margin", "shorter_wins")
    return {name: evaluated[-1].get(name) for name in names} | {"iteration": evaluated[-1]["iteration"]} if evaluated else None


def number(value: float | None, form: str = ".2f") -> str:
    """A number for a reader: "%" as form makes a percentage; None is a dash."""
    if value is None:
        return "–"
    if form == "%":
        return f"{100 * value:.1f}%"
    return f"{value:{form}}".replace("-", "−")


def interval(value: Mapping | None, form: str = ".2f") -> str:
    return "–" if value is None else f"{number(value['mean'], form)} [{number(value['low'], form)}, {number(value['high'], form)}]"


def curves(stages: Mapping[str, Sequence[Mapping]]) -> dict[str, list[dict]]:
    """Stage -> its panels {"title", "svg", "labels", "level"}, stages and panels without data left out."""
    drawn: dict[str, list[dict]] = {}
    for panel in figures.PANELS:
        made = figures.panel_svg(panel, stages[panel.stage]) if panel.stage in stages else None
        if made:
            svg, labels, level = made
            drawn.setdefault(panel.stage, []).append({"title": panel.title, "svg": Markup(svg), "labels": labels, "level": level})
    return drawn


def heldout_samples(replies: Mapping[str, Sequence[dict]]) -> list[dict]:
    """{"prompt", "index", "replies": {model: first sampled row}} for evenly spaced prompts."""
    first = {name: {row["index"]: row for row in rows if row["sample"] == 0} for name, rows in replies.items()}
    indices = sorted(next(iter(first.values())))
    count = min(SAMPLES, len(indices))
    chosen = [indices[i * len(indices) // count] for i in range(count)]
    base = next(iter(first.values()))
    return [{"index": i, "prompt": base[i]["prompt"].strip(), "replies": {name: rows[i] for name, rows in first.items()}}
            for i in chosen]


def question_samples(question_set: QuestionSet, answers: Mapping[str, Sequence[dict]], judgments: Sequence[Mapping]) -> list[dict]:
    """{"id", "category", "turns": [{"question", "answers": {model: {"text", "finish", "score"}}}]} for every question."""
    by_id = {name: {row["question_id"]: row["choices"][0] for row in rows} for name, rows in answers.items()}
    ratings = {(row["model"], row["question_id"], row["turn"]): row["score"] for row in judgments}
    shown = []
    for question in question_set.questions:
        key = question.question_id
        turns = [{"question": text, "answers": {
            name: {"text": rows[key]["turns"][turn], "finish": rows[key]["finish"][turn], "score": ratings.get((name, key, turn + 1))}
            for name, rows in by_id.items()}} for turn, text in enumerate(question.turns)]
        shown.append({"id": key, "category": question.category, "turns": turns})
    return shown


def page(run: str, results: dict, question_set: QuestionSet, answers: Mapping[str, Sequence[dict]], replies: Mapping[str, Sequence[dict]],
         judgments: Sequence[Mapping], stages: Mapping[str, Sequence[Mapping]]) -> str:
    """The HTML text; the same input gives the same bytes."""
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent / "templates"), autoescape=True, undefined=StrictUndefined,
                              trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"number": number, "interval": interval}
    scores, gold = results["scores"], results["heldout"]["gold"]
    rated = {name: {category: cell["mean"] for category, cell in row["categories"].items()}
             for name, row in scores["models"].items() if row["covered"]} if scores else {}
    return environment.get_template("report.html.j2").render(
        run=run, results=results, title=tables.title(results), missing=tables.missing(results),
        header=tables.HEADER, note=tables.NOTE, rows=tables.rows(scores) if scores else [], checks=CHECKS,
        radar=Markup(figures.radar_svg(rated)) if rated else None,
        gold_figure=Markup(figures.interval_svg(gold, "gold")) if gold else None,
        curves=curves(stages), sft_loss=last(stages["sft"], "heldout_loss") if "sft" in stages else None,
        unigram=last(stages["sft"], "unigram_entropy") if "sft" in stages else None,
        heldout=heldout_samples(replies), questions=question_samples(question_set, answers, judgments))


def write(path: str | Path, text: str) -> None:
    """Write whole or not at all: a reader never sees half a file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
