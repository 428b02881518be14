"""The report of a finished run never fails: what is damaged or hostile in its files is named in
it."""

import json
import os

import pytest

from eval.files import foreign
from eval.files.jsonl import dump, write
from eval.report import page as report
from eval.report import run_folder
from tests.support.evaluations import evaluate, make_run


def made(folder) -> str:
    report.write(report.collect([folder]), folder / "report.html")
    return (folder / "report.html").read_text(encoding="utf-8")


def few_curves(folder):
    """A run with a few panels: each of them costs a twentieth of a second."""
    run = make_run(folder)
    rows = [
        {name: row[name] for name in ("iteration", "total", "time", "loss", "kl", "reward")}
        for row in run_folder.metrics(run / "dpo")
    ]
    dump(run / "dpo/metrics.jsonl", rows)
    return run


@pytest.mark.parametrize(
    "name", ["m$\\frac{$", "<script>alert(1)</script>", "a" * 5000, "\u202e\x1b[2J{{ 7 * 7 }}%s$x^$"]
)
def test_a_model_may_be_called_anything(tmp_path, name):
    evaluate(tmp_path, models=("sft", name) if len(name) < 200 and "/" not in name else ("sft", "dpo"))
    if "/" in name or len(name) >= 200:  # no file can be called so, but a key of results.json can
        path = tmp_path / "results.json"
        path.write_text(path.read_text().replace('"dpo', json.dumps(name)[:-1]))
    page = made(tmp_path)
    assert "<script>alert" not in page and "Scores" in page and 'class="radar"' in page


@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "deep", "digits", "binary"])
def test_what_is_no_file_of_ours_is_named_and_the_rest_is_shown(tmp_path, kind):
    run = few_curves(tmp_path / "one")
    names = (
        "config.json",
        "ledger.jsonl",
        "dpo/status.json",
        "dpo/DONE.json",
        "dpo/config.json",
        "dpo/metrics.jsonl",
        "mtbench/question.jsonl",
        "mtbench/model_answer/dpo.jsonl",
    )
    files = [run / name for name in names]
    for path in files:
        path.unlink(missing_ok=True)
        if kind == "pipe":
            os.mkfifo(path)
        elif kind == "device":
            path.symlink_to("/dev/zero")
        elif kind == "folder":
            path.mkdir()
        else:
            content = {
                "deep": b"[" * 200_000,
                "digits": b'{"a": 1' + b"0" * 400 + b"}",
                "binary": bytes(range(256)) * 8,
            }
            path.write_bytes(content[kind] + b"\n")
    page = made(run)
    assert [path for path in files if str(path) not in page] == []
    assert "warm-up, by iteration" in page and "Provenance" in page and "Scores" in page


@pytest.mark.parametrize(
    "values",
    [
        {"scores": {"models": []}, "harness": {"dpo": 1}},
        {"heldout": {"gold": 5}, "versions": None},
        {"judge": []},
        {"models": ["sft"]},
        {"pairwise": {"dpo": {}}, "checks": {"questions": {"dpo": {"texts": "x"}}}},
        {"questions": 0},
    ],
)
def test_values_of_other_types_leave_out_their_part_only(tmp_path, values):
    run = few_curves(tmp_path / "one")
    for file, changed in (
        ("config.json", {"resources": 5, "run": ["x"], "dpo": {"lr": {"a": [[[]]]}}}),
        ("mtbench/results.json", values),
        ("dpo/status.json", {"state": {"a": 1}, "iteration": "many"}),
        ("dpo/DONE.json", {"versions": 7, "outputs": 3, "identity": []}),
    ):
        write(run / file, json.dumps({**run_folder.read_json(run / file), **changed}))
    page = made(run)
    assert "dpo, by iteration" in page and "Provenance" in page and "Not all of what the runs left can be read" in page


@pytest.mark.parametrize("value", ["1e999", "NaN", "-Infinity", "1" + "0" * 30, "1e308", '"x"', "[]"])
def test_numbers_beyond_every_range_end_no_report(tmp_path, value):
    path = few_curves(tmp_path / "one") / "dpo/metrics.jsonl"
    names = (
        "iteration",
        "time",
        "loss",
        "kl",
        "reward",
        "heldout_kl",
        "heldout_reward",
        "heldout_accuracy",
        "heldout_loss",
        "unigram_entropy",
        "seconds_forward",
        "tokens_per_second",
        "peak_gb_update",
        "heldout_accuracy_at_0.5",
        "longer_wins",
    )
    with open(path, "a") as file:
        file.write("\n" + "".join(f'{{"iteration": 9, "total": 9, "time": 9, "{name}": {value}}}\n' for name in names))
    page = made(path.parents[1])
    assert "Reward against distance" in page and "Time and memory" in page


@pytest.mark.parametrize("name", ["../../secret", "/secret"])
def test_rows_outside_the_folder_are_not_shown(tmp_path, name):
    run = few_curves(tmp_path / "one")
    row = json.loads((run / "mtbench/model_answer/sft.jsonl").read_text().split("\n")[0])
    row["choices"][0]["turns"][0] = "a secret text"
    for place in (tmp_path / "secret.jsonl", tmp_path / "one/secret.jsonl"):
        write(place, json.dumps(row) + "\n")
    path = run / "mtbench/results.json"
    results = json.loads(path.read_text())
    results["models"][name.replace("/secret", f"{tmp_path}/secret") if name.startswith("/") else name] = "x"
    write(path, json.dumps(results))
    page = made(run)
    assert "a secret text" not in page and "leads out of the folder" in page


def test_a_stage_that_is_a_link_out_of_the_run_is_left_out(tmp_path):
    few_curves(tmp_path / "other")
    run = few_curves(tmp_path / "one")
    (run / "linked").symlink_to(tmp_path / "other/dpo")
    assert "is a link out of the run" in made(run) and "linked" not in [
        stage.name for stage in run_folder.collect(run).stages
    ]


def test_halves_of_characters_are_replaced(tmp_path):
    assert foreign.parse('{"a\\ud800": ["\\udc00x", "\\ud83d\\ude00"]}') == {"a\ufffd": ["\ufffdx", "\U0001f600"]}
    assert foreign.plain("a\x1b[31mb\x9bc\u202ed\ud800\te\n") == "a\ufffd[31mb\ufffdc\ufffdd\ufffd\te\n"
