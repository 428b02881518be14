"""What the report's browsers show: every question and an even choice of held-out prompts, with all
models' texts side by side. Pure."""

from __future__ import annotations

from collections.abc import Mapping

from eval.files.foreign import texts, whole_number
from eval.report.run_folder import Evaluation

SAMPLES = 24
"""Held-out prompts whose replies are shown, evenly spaced over the file, not chosen by result."""


def heldout(evaluations: Mapping[str, Evaluation]) -> list[dict]:
    """{"prompt", "index", "replies": {model: first sampled row}}; a prompt is shown with the models
    that were asked it."""
    replies = {
        model: {row["index"]: row for row in rows if row["sample"] == 0}
        for one in evaluations.values()
        for model, rows in one.replies.items()
        if rows
    }
    if not replies:
        return []
    base = next(iter(replies.values()))
    indices = sorted(base)
    count = min(SAMPLES, len(indices))
    return [
        {
            "index": i,
            "prompt": base[i]["prompt"].strip(),
            "replies": {
                name: rows[i] for name, rows in replies.items() if i in rows and rows[i]["prompt"] == base[i]["prompt"]
            },
        }
        for i in (indices[place * len(indices) // count] for place in range(count))
    ]


def questions(evaluations: Mapping[str, Evaluation]) -> list[dict]:
    """{"id", "category", "apart", "turns": [{"question", "reference", "answers": {model: {"text",
    "finish", "ratings"}}, "verdicts"}]} for every question; "apart" is the largest difference of
    two models' mean ratings, None where there are no two."""
    shown: dict[tuple, dict] = {}
    for one in evaluations.values():
        ratings: dict[tuple, list] = {}
        for row in one.judgments:
            ratings.setdefault((row["model"], row["question_id"], row["turn"]), []).append(row)
        for question in one.questions:
            key = (question["question_id"], *question["turns"])
            entry = shown.setdefault(key, _empty(question))
            for turn, shelf in enumerate(entry["turns"]):
                shelf["verdicts"] += [
                    row for row in one.pairs if (row["question_id"], row["turn"]) == (key[0], turn + 1)
                ]
            for model, rows in one.answers.items():
                choice = next((row["choices"][0] for row in rows if row["question_id"] == key[0]), None)
                for turn, shelf in enumerate(entry["turns"][: len(choice["turns"])]) if choice else ():
                    ratings_of_turn = sorted(ratings.get((model, key[0], turn + 1), []), key=_repeat)
                    finish = (
                        choice["finish"][turn] if texts(choice.get("finish")) and turn < len(choice["finish"]) else ""
                    )
                    shelf["answers"][model] = {
                        "text": choice["turns"][turn],
                        "finish": finish,
                        "ratings": ratings_of_turn,
                    }
    for entry in shown.values():
        entry["apart"] = _apart(entry["turns"])
    return list(shown.values())


def _repeat(row: Mapping) -> int:
    return row["repeat"] if whole_number(row.get("repeat")) else 0


def _empty(question: Mapping) -> dict:
    turns, reference = question["turns"], question.get("reference")
    reference = reference if texts(reference) and len(reference) >= len(turns) else [""] * len(turns)
    return {
        "id": question["question_id"],
        "category": question["category"],
        "turns": [
            {"question": text, "reference": reference[turn], "answers": {}, "verdicts": []}
            for turn, text in enumerate(turns)
        ],
    }


def _apart(turns: list[dict]) -> float | None:
    means = []
    for model in turns[0]["answers"]:
        values = [
            row["score"]
            for shelf in turns
            for row in shelf["answers"].get(model, {"ratings": ()})["ratings"]
            if row["score"] >= 1
        ]
        means += [sum(values) / len(values)] if values else []
    return max(means) - min(means) if len(means) > 1 else None
