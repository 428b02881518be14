"""The table: its cells, and table.md and table.csv. Without ratings there is no number in it, only what is missing."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass

from eval.answers import TEMPLATE
from eval.questions import CATEGORIES
from eval.scores import COVERAGE, passed

HEADER = ("Model", *("STEM" if category == "stem" else category.capitalize() for category in CATEGORIES), "Avg", "Macro", "Valid")
"""Columns as the reference tutorial's, then the mean of the category means and the ratings behind the row."""


LEAST_QUESTIONS = 6
"""Fewest questions behind a bold difference: with n, all share a sign by chance in 2 of 2^n cases, and the bootstrap can't tell."""
NOTE = ("Intervals are 95%, bootstrap by question. A difference is bold where its interval excludes 0 and it rests on at least "
        f"{LEAST_QUESTIONS} questions. Avg is the mean of all valid ratings, Macro the mean of the category means.")


@dataclass(frozen=True)
class Cell:
    text: str
    interval: str = ""
    bold: bool = False
    """A difference that its interval separates from 0."""


def title(results: dict) -> str:
    """What every table and picture carries: the questions' name, judge, references, template and valid ratings."""
    judge = results["judge"]
    name = judge["kind"] if judge["kind"] == "none" else ", ".join(judge["returned"]) or judge["requested"]
    scores = results["scores"]
    models = scores["models"].items() if scores else ()
    valid = "; ".join(f"{model} {row['n_valid']}/{row['n_expected']}" for model, row in models) or "none"
    return (f"{results['questions']['label']} · judge: {name} · references: {results['questions']['references']} · "
            f"template: {TEMPLATE!r} · valid ratings: {valid}")


def missing(results: dict) -> list[str]:
    """Why there is no table, or no whole one, in sentences; empty where nothing is missing."""
    judge, scores = results["judge"], results["scores"]
    if judge["kind"] == "none":
        return ["No judge has rated the answers (mtbench.judge = \"none\"), so there is no score. The answers are kept; there are two ways "
                "to have them rated, and both reuse them:",
                "A hosted judge: set mtbench.judge = \"openai\", mtbench.judge_url to the address of any OpenAI-compatible endpoint, "
                "mtbench.judge_model to its model, put the key in the environment variable that mtbench.judge_key_variable names, and run "
                "the stage mtbench again.",
                "A judge of your own: serve a model inside the allocation behind an OpenAI-compatible address (for example vllm serve), "
                "set mtbench.judge = \"openai\" and mtbench.judge_url = \"http://localhost:8000/v1\", and run the stage mtbench again."]
    if judge["problem"]:
        return [f"The judge could not be used, so there is no score: {judge['problem']}", "Answers and ratings so far are kept; correct "
                "the cause and run the stage mtbench again."]
    if passed(scores):
        return []
    return [f"{name}: no average, because {row['n_valid']} of {row['n_expected']} ratings are valid ({_reasons(row)}) and "
            f"{COVERAGE:.0%} are needed." for name, row in scores["models"].items() if not row["covered"]]


def _reasons(row: dict) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in row["invalid"].items())


def rows(scores: dict) -> list[list[Cell]]:
    """One row a model in the order of the configuration, then a row for each difference from the first."""
    body = [[Cell(name), *(_model_cells(row) if row["covered"] else [Cell("-")] * (len(CATEGORIES) + 2)),
             Cell(f"{row['n_valid']}/{row['n_expected']}")] for name, row in scores["models"].items()]
    for name, difference in scores["differences"].items():
        cells = [_cell(difference["categories"].get(category), "+.2f") for category in CATEGORIES]
        won = f"{difference['wins']} won, {difference['ties']} tied, {difference['losses']} lost"
        body.append([Cell(f"{name} − {scores['baseline']}"), *cells, _cell(difference["micro"], "+.2f"), Cell(""), Cell(won)])
    return body


def _model_cells(row: dict) -> list[Cell]:
    cells = [_cell(row["categories"].get(category), ".2f") for category in CATEGORIES]
    return [*cells, _cell(row["micro"], ".2f"), Cell(f"{row['macro']:.2f}")]


def _cell(value: dict | None, form: str) -> Cell:
    """An interval as text; a category without a valid rating has "-"."""
    if value is None:
        return Cell("-")
    separated = (value["low"] > 0 or value["high"] < 0) and value["units"] >= LEAST_QUESTIONS
    return Cell(f"{value['mean']:{form}}", f"[{value['low']:{form}}, {value['high']:{form}}]", form.startswith("+") and separated)


def markdown(results: dict) -> str:
    """table.md."""
    lines = [title(results), "", *(line + "\n" for line in missing(results))]
    if results["scores"]:
        lines += ["| " + " | ".join(HEADER) + " |", "|" + "---|" * len(HEADER)]
        for row in rows(results["scores"]):
            cells = [(f"**{cell.text}**" if cell.bold else cell.text) + (f" {cell.interval}" if cell.interval else "") for cell in row]
            lines.append("| " + " | ".join(cells) + " |")
        lines += ["", NOTE]
    return "\n".join(lines) + "\n"


def comma_separated(results: dict) -> str:
    """table.csv: the header alone where there are no ratings."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(HEADER)
    if results["scores"]:
        writer.writerows([cell.text for cell in row] for row in rows(results["scores"]))
    return text.getvalue()
