"""The table: its cells, and table.md and table.csv. Without ratings there is no number in it, only
what is missing."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from eval.files.jsonl import write as write_text
from eval.judges import JUDGES, NO_JUDGE
from eval.questions import CATEGORIES
from eval.scores.ratings import COVERAGE, passed

HEADER = (
    "Model",
    *("STEM" if category == "stem" else category.capitalize() for category in CATEGORIES),
    "Avg",
    "Macro",
    "Valid",
)
"""Columns as the reference tutorial's, then the mean of the category means and the ratings behind
the row."""


LEAST_QUESTIONS = 6
"""Fewest questions behind a bold difference: with n, all share a sign by chance in 2 of 2^n cases,
and the bootstrap can't tell."""
NOTE = (
    "Intervals are 95%, bootstrap by question. A difference is bold where its interval excludes 0 and it rests on at "
    f"least {LEAST_QUESTIONS} questions. Avg is the mean of all valid ratings, Macro the mean of the category means."
)


@dataclass(frozen=True)
class Cell:
    text: str
    interval: str = ""
    bold: bool = False
    """A difference that its interval separates from 0."""


def title(results: dict) -> str:
    """What every table and picture carries: the questions' name, judge, references, template and
    valid ratings."""
    judge = results["judge"]
    name = NO_JUDGE if judge["kind"] == NO_JUDGE else ", ".join(judge["returned"]) or judge["requested"]
    scores = results["scores"]
    models = scores["models"].items() if scores else ()
    valid = "; ".join(f"{model} {row['n_valid']}/{row['n_expected']}" for model, row in models) or "none"
    return (
        f"{results['questions']['label']} · judge: {name} · references: {results['questions']['references']} · "
        f"template: {results['template']!r} · valid ratings: {valid}"
    )


def missing(results: dict) -> list[str]:
    """Why there is no table, or no whole one, in sentences; empty where nothing is missing."""
    judge, scores = results["judge"], results["scores"]
    if judge["kind"] == NO_JUDGE:
        return [
            'No judge has rated the answers (mtbench.judge = "none"), so there is no score. The answers are kept; '
            "each of these judges can rate them as they are:",
            *(kind.advice for kind in JUDGES.values()),
        ]
    if judge["problem"]:
        return [
            f"The judge could not be used, so there is no score: {judge['problem']}",
            "Answers and ratings so far are kept; correct the cause and run the stage mtbench again.",
        ]
    return without_average(scores["models"]) + without_win_rate((results["pairwise"] or {}).items())


def without_average(models: dict) -> list[str]:
    return [
        f"{name}: no average, because {row['n_valid']} of {row['n_expected']} ratings are valid ({_reasons(row)}) and "
        f"{COVERAGE:.0%} are needed.{_refusal_text(row)}"
        for name, row in models.items()
        if not row["covered"]
    ]


def without_win_rate(pairs: Iterable[tuple[str, dict]]) -> list[str]:
    return [
        f"{name} against {row['baseline']}: no win rate, because {row['n_valid']} of {row['n_expected']} comparisons "
        f"have a verdict in both orders and {COVERAGE:.0%} are needed."
        for name, row in pairs
        if not row["covered"]
    ]


def covered(results: dict) -> bool:
    """Are there enough valid ratings and comparisons for all that was asked for? True without a
    judge, which is asked for nothing."""
    return (
        not results["scores"]
        or passed(results["scores"])
        and all(row["covered"] for row in (results["pairwise"] or {}).values())
    )


def _refusal_text(row: dict) -> str:
    """What to do about the commonest cause, and what the judge said where it refused."""
    cut = " Replies were cut at mtbench.judge_max_tokens: raise it." if row["invalid"].get("cut") else ""
    refusal = next((each["refusal"] for each in row.get("absent", []) if each.get("refusal")), "")
    return cut + (f" The judge refused: {refusal[:200]}" if refusal else "")


def _reasons(row: dict) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in row["invalid"].items())


def rows(scores: dict) -> list[list[Cell]]:
    """One row a model in the order of the configuration, then a row for each difference from the
    first."""
    body = [
        [
            Cell(name),
            *(_model_cells(row) if row["covered"] else [Cell("-")] * (len(CATEGORIES) + 2)),
            Cell(f"{row['n_valid']}/{row['n_expected']}"),
        ]
        for name, row in scores["models"].items()
    ]
    for name, difference in scores["differences"].items():
        cells = [_cell(difference["categories"].get(category), "+.2f") for category in CATEGORIES]
        won = f"{difference['wins']} won, {difference['ties']} tied, {difference['losses']} lost"
        body.append(
            [Cell(f"{name} − {scores['baseline']}"), *cells, _cell(difference["micro"], "+.2f"), Cell(""), Cell(won)]
        )
    return body


def _model_cells(row: dict) -> list[Cell]:
    cells = [_cell(row["categories"].get(category), ".2f") for category in CATEGORIES]
    return [*cells, _cell(row["micro"], ".2f"), Cell("-" if row["macro"] is None else f"{row['macro']:.2f}")]


def _cell(value: dict | None, form: str) -> Cell:
    """An interval as text; a category without a valid rating has "-"."""
    if value is None:
        return Cell("-")
    separated = (value["low"] > 0 or value["high"] < 0) and value["units"] >= LEAST_QUESTIONS
    return Cell(
        f"{value['mean']:{form}}",
        f"[{value['low']:{form}}, {value['high']:{form}}]",
        form.startswith("+") and separated,
    )


PAIR_HEADER = (
    "Model",
    "Against",
    "Win rate",
    "At equal length",
    "Won",
    "Tied",
    "Lost",
    "Orders disagree",
    "First preferred",
    "Valid",
)
PAIR_NOTE = (
    "Each pair is judged in both orders; where the two verdicts disagree it is a tie, and a tie counts half. The win "
    "rate at equal length is AlpacaEval 2's regression (Dubois et al. 2024) without its term for an instruction's "
    "difficulty. Bold: its interval excludes one half."
)


def pair_rows(pairwise: dict) -> list[list[Cell]]:
    """One row a model, in the columns of PAIR_HEADER."""
    return cells_of_pairs(pairwise.items())


def cells_of_pairs(pairs: Iterable[tuple[str, dict]]) -> list[list[Cell]]:
    return [
        [
            Cell(name),
            Cell(row["baseline"]),
            *(_rate(row.get(key)) for key in ("win_rate", "length_controlled")),
            *(Cell(str(row[key])) for key in ("wins", "ties", "losses")),
            Cell(f"{row['orders_disagree']} of {row['n_valid']}"),
            Cell("-" if row["first_preferred"] is None else f"{row['first_preferred']:.0%}"),
            Cell(f"{row['n_valid']}/{row['n_expected']}"),
        ]
        for name, row in pairs
    ]


def _rate(value: dict | None) -> Cell:
    """A win rate in percent."""
    if value is None:
        return Cell("-")
    separated = (value["low"] > 0.5 or value["high"] < 0.5) and value["units"] >= LEAST_QUESTIONS
    return Cell(f"{value['mean']:.1%}", f"[{value['low']:.1%}, {value['high']:.1%}]", separated)


def notes(results: dict) -> list[str]:
    """What has to be known beside the numbers, in sentences: ratings that are missing, rows that
    repeat others, and how far a judge that rated each answer several times is from itself."""
    models = results["scores"]["models"] if results["scores"] else {}
    pairs = {f"{name} against {row['baseline']}": row for name, row in (results["pairwise"] or {}).items()}
    adapted = results["judge"].get("adapted", [])
    return [
        *about_ratings(models),
        *_absent(pairs, "comparisons"),
        *([f"The judge does not take all of the usual request: {'; '.join(adapted)}."] if adapted else []),
    ]


def about_ratings(models: dict) -> list[str]:
    return [*_absent(models, "ratings"), *_repeated(models), *_spread(models)]


def _absent(models: dict, what: str) -> list[str]:
    """Of models with an average; those without one have a sentence of their own (``missing``)."""
    lines = []
    for name, row in models.items():
        absent = row.get("absent", [])
        if row["covered"] and absent:
            count = row["n_expected"] - row["n_valid"]
            places = ", ".join(
                f"question {each['question_id']} turn {each['turn']} ({each['reason']})" for each in absent
            )
            more = ", ..." if count > len(absent) else ""
            refusal = next((each["refusal"] for each in absent if each.get("refusal")), "")
            lines.append(
                f"{name}: {count} of {row['n_expected']} {what} are missing from the averages: {places}{more}."
                + (f" The judge refused: {refusal[:200]}" if refusal else "")
            )
    return lines


def _repeated(models: dict) -> list[str]:
    return [
        f"{name}: {row['fastchat']['repeated']} rows repeat the place of another (question and turn). Avg counts the "
        f"last of each; FastChat's show_result averages all {row['fastchat']['rows']} rows: "
        f"{row['fastchat']['mean']:.6f}" + (f" instead of {row['micro']['mean']:.6f}." if row["covered"] else ".")
        for name, row in models.items()
        if row.get("fastchat")
    ]


def _spread(models: dict) -> list[str]:
    return [
        f"{name}: repeated ratings of one answer differ by {row['spread']['rating_sd']:.2f} "
        "points (standard deviation); the averages of the repeats are "
        f"{', '.join('-' if a is None else format(a, '.2f') for a in row['spread']['averages'])}."
        for name, row in models.items()
        if row.get("spread") and row["spread"]["rating_sd"] is not None
    ]


def markdown(results: dict) -> str:
    """table.md."""
    lines = [title(results), "", *(line + "\n" for line in missing(results))]
    if results["scores"]:
        lines += [*pipes(HEADER, rows(results["scores"])), "", NOTE, *("\n" + line for line in notes(results))]
    if results["pairwise"]:
        lines += ["", *pipes(PAIR_HEADER, pair_rows(results["pairwise"])), "", PAIR_NOTE]
    return "\n".join(lines) + "\n"


def pipes(header: tuple[str, ...], body: list[list[Cell]]) -> list[str]:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for row in body:
        cells = [
            (f"**{cell.text}**" if cell.bold else cell.text) + (f" {cell.interval}" if cell.interval else "")
            for cell in row
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def comma_separated(results: dict) -> str:
    """table.csv: the header alone where there are no ratings."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(HEADER)
    if results["scores"]:
        writer.writerows([cell.text for cell in row] for row in rows(results["scores"]))
    return text.getvalue()


def write(folder: str | Path, results: dict) -> None:
    """results.json, table.md and table.csv."""
    write_text(Path(folder) / "results.json", json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    write_text(Path(folder) / "table.md", markdown(results))
    write_text(Path(folder) / "table.csv", comma_separated(results))
