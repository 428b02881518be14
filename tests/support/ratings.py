"""FastChat's published judgments, and scores computed from rows."""

from pathlib import Path

DATA = Path(__file__).parents[3] / "shared/data"

OFFICIAL, JUDGMENTS = DATA / "mt_bench_official", DATA / "mt_bench_judgments"


def results(found: dict) -> dict:
    return {
        "questions": {"label": "Convoy questions", "references": "own"},
        "scores": found,
        "pairwise": None,
        "template": "{question}",
        "judge": {"kind": "openai", "requested": "j", "returned": ["j"], "problem": ""},
    }


def row(question: int, turn: int, score: float, model: str = "m", **more) -> dict:
    return {
        "question_id": question,
        "model": model,
        "judge": ["gpt-4", "single-v1"],
        "turn": turn,
        "score": score,
        **more,
    }


def pair(question: int, turn: int, first: str, second: str, **more) -> dict:
    return {
        "question_id": question,
        "model_1": "a",
        "model_2": "b",
        "g1_winner": first,
        "g2_winner": second,
        "turn": turn,
        "judge": ["gpt-4", "pair-v2"],
        **more,
    }


RATINGS = [row(question, turn, 6 + turn) for question in range(81, 91) for turn in (1, 2)]
