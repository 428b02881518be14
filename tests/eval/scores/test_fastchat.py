"""Files that FastChat's own tools read: by a reader written from their schema, and by FastChat's
show_result.py where it is in build/fschat (CONTRIBUTING.md)."""

import json
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

from eval import questions
from eval.judge import ask_all
from eval.scores import ratings, win_rate
from tests.support.judge import IDS, answers, config, good

BUILD = Path(__file__).parents[3] / "build/fschat"
SCRIPT = BUILD / "fastchat/llm_judge/show_result.py"
QUESTIONS = questions.load("embedded")


@pytest.fixture
def judged(serve, tmp_path):  # noqa: F811
    """Two models, rated twice and compared, by a judge whose verdict depends on the text alone; a
    few ratings are none."""

    def verdict(body: dict) -> tuple:
        text = "".join(message["content"] for message in body["messages"])
        number = sum(map(ord, text))
        if "ssistant A]" not in text:
            return good("none" if number % 31 == 0 else f"[[{1 + number % 10}]]")
        preferred, other = ("sft {1}", "rlhf {1}") if number % 3 else ("rlhf {1}", "sft {1}")
        return good(
            ("[[A]]", "[[C]]")[number % 7]
            if number % 7 < 2
            else "[[A]]"
            if text.index(preferred) < text.index(other)
            else "[[B]]"
        )

    made = {name: [row | {"model_id": name} for row in answers(name)["sft"]] for name in ("sft", "rlhf")}
    settings = config(serve(good(), rest=verdict), tmp_path, judge_pairwise=True, judge_repeats=2, judge_model="judge")
    rows, pairs = ask_all.rate(settings, ask_all.ratings(settings, QUESTIONS, made), QUESTIONS.prompts, lambda n: None)
    categories = {question.question_id: question.category for question in QUESTIONS.questions}
    lengths = {(name, question, turn): 1 for name in made for question in IDS for turn in (1, 2)}
    return (
        tmp_path / "model_judgment",
        ratings.table(rows, categories, ["sft", "rlhf"], 0, 2)["models"],
        win_rate.table(pairs, lengths, IDS, 0)["rlhf"],
    )


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_reader_of_the_schema_finds_our_numbers(judged):
    """Mean of "score" by "model" without -1, as show_result.py prints it; wins, losses and ties of
    g1_winner and g2_winner."""
    folder, table, duel = judged
    single = defaultdict(list)
    for row in lines(folder / "judge_single.jsonl"):
        if row["score"] != -1:
            single[row["model"]].append(row["score"])
    assert {name: sum(values) / len(values) for name, values in single.items()} == pytest.approx(
        {name: row["micro"]["mean"] for name, row in table.items()}
    )
    assert sum(map(len, single.values())) == sum(row["n_valid"] for row in table.values())
    tally = defaultdict(int)
    for row in lines(folder / "judge_pair.jsonl"):
        agreed = row["g1_winner"] if row["g1_winner"] == row["g2_winner"] else "tie"
        tally[row[agreed] if agreed != "tie" else "tie"] += "error" not in (row["g1_winner"], row["g2_winner"])
    assert (tally["rlhf"], tally["tie"], tally["sft"]) == (duel["wins"], duel["ties"], duel["losses"])
    assert duel["wins"] and duel["ties"] and duel["losses"]


def show_result(folder: Path, mode: str, *more: str) -> str:
    """What FastChat's unmodified show_result.py prints about ``folder``/judge_*.jsonl, run from the
    folder in which it expects data/."""
    bench = folder.parent / "data/mt_bench"
    bench.mkdir(parents=True, exist_ok=True)
    if not (bench / "model_judgment").exists():
        (bench / "model_judgment").symlink_to(folder)
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--judge-model", "judge", "--mode", mode, *more],
        cwd=folder.parent,
        text=True,
        env=os.environ | {"PYTHONPATH": str(BUILD)},
        capture_output=True,
        check=True,
    )
    return done.stdout


@pytest.mark.skipif(
    not SCRIPT.is_file(), reason="FastChat is not in build/fschat: CONTRIBUTING.md says how to put it there"
)
def test_fastchats_own_script_prints_our_numbers(judged):
    folder, table, duel = judged
    printed = show_result(folder, "single").split("########## Average ##########")[1]
    found = {
        line.split()[0]: float(line.split()[1])
        for line in printed.splitlines()
        if line.split()[:1] in (["sft"], ["rlhf"])
    }
    assert found == pytest.approx({name: row["micro"]["mean"] for name, row in table.items()}, abs=1e-6)
    printed = show_result(folder, "pairwise-baseline", "--baseline-model", "sft")
    row = next(line.split() for line in printed.splitlines() if line.startswith("rlhf"))
    assert [int(value) for value in row[1:4]] == [duel["wins"], duel["losses"], duel["ties"]]
    assert float(row[-1]) == pytest.approx(duel["win_rate"]["mean"], abs=1e-6)
