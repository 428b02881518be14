"""A judge of one's own is a module with ``open_judge`` and a row in ``eval.judges.JUDGES``: this
file is the module, and the test adds the row."""

import contextlib
import json

from eval.config import load
from eval.evaluation import main
from eval.files.jsonl import read
from eval.judge.protocol import Completion
from eval.judges import JUDGES, JudgeKind
from launcher.checks.judge import check_judge
from launcher.config.profile import Profile
from tests.support.evaluations import prepare

RATING = 4


class ConstantJudge:
    """Gives every answer the same rating."""

    def __init__(self, model: str, budget):
        self.model, self.budget = model, budget

    def __str__(self) -> str:
        return "a constant"

    def complete(self, system: str, user: str) -> Completion:
        reserve = self.budget.request(len(system + user))
        self.budget.settle(reserve, 3, 2)
        return Completion(f"Rating: [[{RATING}]]", self.model, tokens_in=3, tokens_out=2)


@contextlib.contextmanager
def open_judge(config, budget):
    yield ConstantJudge(config.judge_model, budget)


def test_a_row_makes_a_judge_of_a_module(folders, tmp_path, monkeypatch, capsys):
    advice = 'A constant: set mtbench.judge = "constant".'
    monkeypatch.setitem(JUDGES, "constant", JudgeKind(module=__name__, advice=advice))
    models = {"sft": folders["sft"]}
    path = prepare(tmp_path / "judged", models, judge="constant", judge_model="four", judge_price_in=1.0)
    assert check_judge(load(path), Profile(name="local", scheduler="local")) == ""
    assert main([str(path)]) == 0
    results = json.loads((path.parent / "results.json").read_text())
    judge = results["judge"]
    assert (judge["kind"], judge["returned"], judge["tokens_in"]) == ("constant", ["four"], 48 * 3)
    assert results["scores"]["models"]["sft"]["micro"]["mean"] == RATING
    rows = read(path.parent / "model_judgment/four_single.jsonl")
    assert len(rows) == 48 and {row["score"] for row in rows} == {RATING}
    output = capsys.readouterr().out
    assert "judge four at a constant: 49 requests" in output and "judge four: 49 requests" in output

    unjudged = prepare(tmp_path / "unjudged", models)
    assert main([str(unjudged)]) == 0
    assert advice in (unjudged.parent / "table.md").read_text()
