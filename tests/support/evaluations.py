"""Runs and evaluations as the report reads them."""

import json
from pathlib import Path

from eval.files.jsonl import dump, write
from eval.judge import single
from eval.scores import gold_score, ratings, text_checks, win_rate

CATEGORIES = ("math", "math", "coding", "writing", "stem", "stem")

QUESTIONS = [
    {
        "question_id": number,
        "category": category,
        "turns": [f"question {number}" + " needle" * (number == 3), "and then?"],
        "reference": ["so", "and so"],
    }
    for number, category in enumerate(CATEGORIES, start=1)
]

IDS = [row["question_id"] for row in QUESTIONS]


def evaluate(folder: Path, plus: int = 2, judged_by: str = "j", models: tuple = ("sft", "dpo")) -> None:
    """An evaluation of two models, the second rated ``plus`` points higher, made by the same
    functions as the stage's."""
    made, replies, rows, pairs = {}, {}, [], []
    for place, name in enumerate(models):
        made[name] = [
            {
                "question_id": number,
                "answer_id": f"{name}{number}",
                "model_id": name,
                "choices": [
                    {
                        "index": 0,
                        "turns": [f"{name} says <b>{number}</b> " * (place + 1), ""],
                        "finish": ["eos", "length"],
                        "tokens": [5, 1],
                    }
                ],
            }
            for number in IDS
        ]
        replies[name] = [
            {
                "index": i,
                "sample": 0,
                "prompt": f"\n\nHuman: {i}?\n\nAssistant:",
                "response": " yes",
                "tokens": [1, 2],
                "finish": "eos",
                "gold": (i + place) / 4,
            }
            for i in range(3)
        ]
        rows += [
            {
                "question_id": number,
                "model": name,
                "judge": ["j", "single-v1"],
                "user_prompt": "",
                "judgment": f"[[{3 + place * plus}]]",
                "score": 3 + place * plus,
                "turn": turn,
                "tstamp": 0,
                "answer_id": f"{name}{number}",
                "judge_id": judged_by,
            }
            for number in IDS
            for turn in (1, 2)
        ]
    for number in IDS:
        pairs += [
            {
                "question_id": number,
                "model_1": models[1],
                "model_2": models[0],
                "g1_winner": "model_1",
                "g2_winner": "model_1",
                "judge": ["j", "pair-v2"],
                "g1_user_prompt": "",
                "g1_judgment": "[[A]]",
                "g2_user_prompt": "",
                "g2_judgment": "[[B]]",
                "turn": turn,
                "tstamp": 0,
                "answer_ids": [f"{models[1]}{number}", f"{models[0]}{number}"],
                "judge_id": judged_by,
            }
            for turn in (1, 2)
        ]
    for name in models:
        dump(folder / "model_answer" / f"{name}.jsonl", made[name])
        dump(folder / "heldout" / f"{name}.jsonl", replies[name])
    dump(single.judgment_path(str(folder), "j"), rows)
    dump(single.judgment_path(str(folder), "j", "pair"), pairs)
    dump(folder / "question.jsonl", QUESTIONS)
    lengths = {(name, row["question_id"], turn): 1 for name in models for row in made[name] for turn in (1, 2)}
    kls = {models[1]: [{"index": i, "sample": 0, "kl": 0.5} for i in range(3)]}
    write(
        folder / "results.json",
        json.dumps(
            {
                "questions": {
                    "label": "MT-Bench",
                    "source": "x",
                    "count": 6,
                    "references": "gpt-4",
                    "sha256": {"question.jsonl": "ab" * 32},
                },
                "template": "{question}",
                "stop": "",
                "models": dict.fromkeys(models, "0123456789abcdef"),
                "baseline": models[0],
                "seed": 0,
                "max_new_tokens": 9,
                "judge": {
                    "kind": "openai",
                    "requested": "j",
                    "returned": [judged_by],
                    "problem": "",
                    "repeats": 1,
                    "requests": 36,
                    "tokens_in": 10,
                    "tokens_out": 5,
                    "cost": 0.25,
                    "currency": "EUR",
                },
                "scores": ratings.table(rows, {row["question_id"]: row["category"] for row in QUESTIONS}, models, 0),
                "pairwise": win_rate.table(pairs, lengths, IDS, 0),
                "heldout": gold_score.summary(replies, kls, 0),
                "checks": {
                    "questions": {
                        name: text_checks.check(text_checks.of_answers(given)) for name, given in made.items()
                    },
                    "heldout": {},
                },
                "reward_model": {},
                "harness": {
                    name: {"arc_tiny": {"metrics": {"acc": {"value": 0.25, "stderr": 0.1}}, "examples": 4}}
                    for name in models
                },
                "harness_problem": "",
                "versions": {"python": "3"},
            }
        ),
    )


def make_run(folder: Path, lr: float = 1e-3, **values) -> Path:
    """A run with stages that no one has heard of: "warm-up", and "dpo" where another chain has
    "rlhf"."""
    resources = {"dpo": {"nodes": 2, "gpus_per_node": 4}}
    write(
        folder / "config.json",
        json.dumps(
            {
                "run": {"name": folder.name, "id": folder.name + "-1", "recipe": "r", "profile": "p"},
                "dpo": {"lr": lr, "beta": 0.1},
                "resources": resources,
            }
        ),
    )
    events = [
        {"time": 10, "event": "started", "stage": "warm-up"},
        {"time": 15, "event": "done", "stage": "warm-up", "class": "done"},
        {"time": 20, "event": "started", "stage": "dpo"},
        {"time": 50, "event": "requeued", "stage": "dpo", "class": "time limit"},
        {"time": 60, "event": "submitted", "stage": "dpo"},
        {"time": 100, "event": "started", "stage": "dpo"},
        {"time": 160, "event": "done", "stage": "dpo", "class": "done"},
        {"time": 170, "event": "started", "stage": "mtbench"},
    ]
    dump(folder / "ledger.jsonl", events)
    dump(
        folder / "warm-up/metrics.jsonl",
        [{"iteration": i, "total": 3, "time": i, "temperature_of_the_room": 20 + i} for i in (1, 2, 3)],
    )
    rows = [
        {
            "iteration": i,
            "total": 3,
            "time": i,
            "loss": 1 / i,
            "lr": lr,
            "kl": i / 10,
            "reward": float(i),
            "heldout_kl": i / 5,
            "heldout_reward": i / 2,
            "seconds_forward": 2.0,
            "seconds_update": float(i),
            "tokens_per_second": 100.0 * i,
            "peak_gb_update": 3.0 + i,
            "tokens_per_second_update": 9.0 * i,
            "odd_number": i,
            "heldout_accuracy": 0.8,
            "heldout_accuracy_low": 0.7,
            "heldout_accuracy_high": 0.9,
            "longer_wins": 0.75,
            "shorter_wins": 0.25,
            "heldout_accuracy_at_0.5": 0.6,
            "heldout_accuracy_at_0.9": 0.9,
        }
        for i in (1, 2, 3)
    ]
    dump(folder / "dpo/metrics.jsonl", rows)
    with open(folder / "dpo/metrics.jsonl", "a") as file:
        file.write('{"iteration": 4, "lo')
    write(folder / "dpo/status.json", json.dumps({"state": "done", "iteration": 3}))
    write(
        folder / "dpo/DONE.json",
        json.dumps(
            {
                "identity": "feed" * 16,
                "config_hash": "c0de" * 16,
                "outputs": {"a": {}},
                "versions": {"torch": "2", "commit": "abc123"},
            }
        ),
    )
    evaluate(folder / "mtbench", **values)
    return folder


def prepare(folder: Path, models: dict, **values) -> Path:
    """A run folder with four held-out prompts and the three trainers' metrics; returns the stage's
    config.json."""
    run = folder / "nice <run>"
    for stage in ("sft", "reward", "rlhf", "mtbench"):
        (run / stage).mkdir(parents=True)
    rubric = {"must": ["a"], "must_not": ["the"], "max_words": 9}
    (run / "heldout.jsonl").write_text(
        "".join(
            json.dumps({"prompt": f"\n\nHuman: <script>alert({i})</script> & why?\n\nAssistant:", "rubric": rubric})
            + "\n"
            for i in range(4)
        )
    )
    metrics = {
        "sft": {"loss": 2.5, "heldout_loss": 2.25, "unigram_entropy": 4.5},
        "rlhf": {"reward": 1.0, "kl": 2.0, "eos_rate": 0.5},
        "reward": {
            "accuracy": 0.9,
            "heldout_accuracy": 0.875,
            "heldout_accuracy_low": 0.81,
            "heldout_accuracy_high": 0.92,
            "heldout_margin": 1.5,
            "shorter_wins": 0.5625,
        },
    }
    for stage, row in metrics.items():
        lines = [{"iteration": i, "total": 2, "time": 0.0} | row for i in (1, 2)]
        (run / stage / "metrics.jsonl").write_text(
            "".join(json.dumps(line) + "\n" for line in lines) + '{"iteration": 3, "lo'
        )
    config = {
        "paths": {
            "output": str(run / "mtbench"),
            "models": {name: str(path) for name, path in models.items()},
            "heldout": str(run / "heldout.jsonl"),
            "stages": {stage: str(run / stage) for stage in metrics},
            "report": str(run / "report.html"),
        },
        "max_new_tokens": 6,
        "heldout_max_new_tokens": 6,
        "batch_size": 8,
        "judge_key_variable": "JUDGE_KEY",
        **values,
    }
    path = run / "mtbench" / "config.json"
    path.write_text(json.dumps(config))
    return path
