"""Comparisons in both orders by a real endpoint, win rates by hand, and length control against
torch's own optimiser."""

import numpy as np
import pytest
import torch

from eval.errors import DataError
from eval.judge import ask_all, pairwise
from eval.judge.verdict import first_preference
from eval.report import table
from eval.scores import win_rate
from tests.support.judge import IDS, QUESTIONS, answers, config, good
from tests.support.ratings import results

NO_SCORES = {"models": {}, "differences": {}, "baseline": ""}


def made() -> dict[str, list[dict]]:
    """The answers of "rlhf" are longer than those of "sft" except for the first question."""
    one, two = answers("mine")["sft"], answers("mine, at greater length,")["sft"]
    two[0] = answers("m")["sft"][0]
    return {"sft": one, "rlhf": [row | {"model_id": "rlhf"} for row in two]}


def prefers_longer(body: dict) -> tuple:
    text = "".join(message["content"] for message in body["messages"])
    if "capital of France" in text:
        return good("[[9]]")
    part = (
        text.split("[Answer of assistant B]")
        if "[Answer of assistant B]" in text
        else text.split("[Dialogue with assistant B]")
    )
    a, b = len(part[0].split("ssistant A]", 1)[1]), len(part[1])
    return good("[[A]]" if a > b else "[[B]]")


def compare(server, folder, **values) -> list[dict]:
    settings = config(server, folder, judge_pairwise=True, **values)
    works = ask_all.ratings(settings, QUESTIONS, made())
    return ask_all.rate(settings, works[1:], QUESTIONS.prompts, lambda n: None)[0]


def test_pairs_are_asked_in_both_orders_and_kept_in_fastchats_schema(serve, tmp_path):  # noqa: F811
    server = serve(rest=prefers_longer)
    rows = compare(server, tmp_path)
    assert len(rows) == 48 and len(server.seen) == 1 + 96
    assert set(rows[0]) >= {
        "question_id",
        "model_1",
        "model_2",
        "g1_winner",
        "g2_winner",
        "judge",
        "g1_user_prompt",
        "g1_judgment",
        "g2_user_prompt",
        "g2_judgment",
        "turn",
        "tstamp",
    }
    assert {(row["model_1"], row["model_2"]) for row in rows} == {("rlhf", "sft")}
    assert all(
        row["g1_winner"] == row["g2_winner"] == ("model_2" if row["question_id"] == 1 else "model_1") for row in rows
    )
    names = {row["judge"][1] for row in rows}
    assert names == {"pair-v2", "pair-math-v1", "pair-v2-multi-turn", "pair-math-v1-multi-turn"}
    assert (tmp_path / "model_judgment/org_judge_pair.jsonl").exists()
    lengths = {
        (name, row["question_id"], turn + 1): len(text)
        for name, given in made().items()
        for row in given
        for turn, text in enumerate(row["choices"][0]["turns"])
    }
    found = win_rate.table(rows, lengths, IDS, seed=0)["rlhf"]
    assert (found["wins"], found["ties"], found["losses"], found["orders_disagree"]) == (46, 0, 2, 0)
    assert found["win_rate"]["mean"] == pytest.approx(46 / 48) and found["first_preferred"] == 0.5
    # the judge likes length: without it less is left
    assert found["length_controlled"]["mean"] < found["win_rate"]["mean"]
    assert len(compare(server, tmp_path)) == 48 and len(server.seen) == 97


def test_a_judge_that_always_takes_the_first_gives_ties_only(serve, tmp_path):  # noqa: F811
    rows = compare(serve(good(), rest=good("[[A]]")), tmp_path)
    found = win_rate.table(rows, {(m, q, t): 1 for m in ("sft", "rlhf") for q in IDS for t in (1, 2)}, IDS, seed=0)[
        "rlhf"
    ]
    assert (found["ties"], found["orders_disagree"], found["first_preferred"], found["win_rate"]["mean"]) == (
        48,
        48,
        1.0,
        0.5,
    )


@pytest.mark.parametrize(
    "text, verdict",
    [("so [[A]]", "A"), ("[[B]]", "B"), ("[[C]]", "tie"), ("[A]", "error"), ("", "error"), ("[[B]], not [[A]]", "A")],
)
def test_verdicts_are_read_as_fastchat_reads_them(text, verdict):
    assert first_preference(text) == verdict


def pair(question: int, turn: int, first: str, second: str) -> dict:
    return {
        "question_id": question,
        "turn": turn,
        "model_1": "new",
        "model_2": "old",
        "g1_winner": first,
        "g2_winner": second,
    }


def test_a_win_rate_by_hand():
    """Win, disagreement, tie, loss | one order without a verdict counts for nothing; below 95% of
    the verdicts there is no rate."""
    rows = [
        pair(1, 1, "model_1", "model_1"),
        pair(1, 2, "model_1", "model_2"),
        pair(2, 1, "tie", "tie"),
        pair(2, 2, "model_2", "model_2"),
    ]
    lengths = {(name, question, turn): 10 for name in ("new", "old") for question in (1, 2) for turn in (1, 2)}
    found = win_rate.table(rows, lengths, [1, 2], seed=0)["new"]
    assert [found[name] for name in ("wins", "ties", "losses", "n_valid", "n_expected", "orders_disagree")] == [
        1,
        2,
        1,
        4,
        4,
        1,
    ]
    assert found["win_rate"]["mean"] == 0.5 and found["length_controlled"]["mean"] == pytest.approx(0.5)
    assert found["first_preferred"] == pytest.approx(4 / 6)  # 1st: yes, no | yes, yes | - | no, yes
    text = table.markdown(results(NO_SCORES) | {"pairwise": {"new": found}})
    assert "| new | old | 50.0% [25.0%, 75.0%] | 50.0% [" in text and "4/4" in text
    holed = win_rate.table([*rows[:3], pair(2, 2, "error", "model_1")], lengths, [1, 2], seed=0)["new"]
    assert holed["n_valid"] == 3 and not holed["covered"] and "win_rate" not in holed
    assert "no win rate, because 3 of 4 comparisons" in " ".join(
        table.missing(results(NO_SCORES) | {"pairwise": {"new": holed}})
    )


def by_torch(outcomes: np.ndarray, x: np.ndarray, weights: np.ndarray) -> float:
    """sigmoid(theta) of the same penalised likelihood, by L-BFGS."""
    y, z, w = (torch.tensor(array, dtype=torch.float64) for array in (outcomes, x, weights))
    parameters = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [parameters], max_iter=500, tolerance_grad=1e-12, tolerance_change=1e-14, line_search_fn="strong_wolfe"
    )

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        logits = parameters[0] + parameters[1] * z
        value = (w * torch.nn.functional.binary_cross_entropy_with_logits(logits, y, reduction="none")).sum()
        value = value + parameters[1] ** 2 / (2 * win_rate.C)
        value.backward()
        return value

    optimizer.step(loss)
    return parameters[0].sigmoid().item()


def test_length_control_is_the_regression_that_it_says():
    draw = np.random.default_rng(3)
    longer = draw.normal(200, 300, size=120)
    outcomes = draw.choice([0.0, 0.5, 1.0], size=120, p=[0.2, 0.3, 0.5])
    outcomes[longer > 300] = 1
    x = np.tanh(longer / longer.std(ddof=1))
    weights = np.stack([np.ones(120), draw.integers(0, 4, size=120).astype(float)])
    found = win_rate.fit(outcomes, x, weights)
    assert found == pytest.approx([by_torch(outcomes, x, row) for row in weights], abs=1e-6)
    units = np.arange(120) // 2
    mean, low, high = win_rate.length_controlled(outcomes, longer, units, 60, seed=0)
    assert mean == pytest.approx(found[0]) and low < mean < high and mean < outcomes.mean() - 0.02
    # nothing to control
    assert win_rate.length_controlled(outcomes, np.full(120, 7.0), units, 60, 0)[0] == pytest.approx(outcomes.mean())
    mean, low, high = win_rate.length_controlled(np.ones(120), longer, units, 60, 0)
    assert (mean, high) == (1, 1) and 0 < low < 1


def test_a_rate_that_no_resample_doubts_has_an_interval_by_what_is_equally_long():
    """20 pairs of equal length, all won, and losses only far from it: 95% of Clopper and Pearson
    for 20 of 20 begin at .832."""
    longer = np.array([0.0] * 20 + [-90.0] * 5 + [90.0] * 15)
    outcomes = np.array([1.0] * 20 + [0.0] * 5 + [1.0] * 15)
    mean, low, high = win_rate.length_controlled(outcomes, longer, np.arange(40), 40, 0)
    assert mean > 0.99 and low == pytest.approx(0.8316, abs=1e-4) and high > 0.99
    mean, low, high = win_rate.length_controlled(1 - outcomes, longer, np.arange(40), 40, 0)
    assert mean < 0.01 and low < 0.01 and high == pytest.approx(0.1684, abs=1e-4)


def test_a_rate_that_is_extrapolated_says_so():
    """Each reply of one model is far shorter than the other's: nothing is known of equal length."""
    draw = np.random.default_rng(0)
    longer, outcomes = -draw.uniform(100, 200, 60), (draw.random(60) < 0.7).astype(float)
    assert win_rate.length_controlled(outcomes, longer, np.arange(60), 60, 0)[1:] == (0, 1)


def test_a_single_model_can_not_be_compared():
    with pytest.raises(DataError, match="expected two or more models"):
        pairwise.require(QUESTIONS, ["sft"])
