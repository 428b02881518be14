"""A run's folder as the report reads it. Nothing in it is taken for granted: what is absent or torn
is left out.

Which stages there are, their names, their order and what they measured is what the folder says, not
what this file knows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from eval.errors import DataError
from eval.files import foreign
from eval.files.foreign import number, text, texts, whole_number
from eval.judge import single

RESULTS = {
    "questions",
    "template",
    "models",
    "baseline",
    "seed",
    "max_new_tokens",
    "judge",
    "scores",
    "pairwise",
    "heldout",
    "checks",
    "reward_model",
    "harness",
    "harness_problem",
    "versions",
}
JUDGE = {
    "kind",
    "requested",
    "returned",
    "problem",
    "repeats",
    "requests",
    "tokens_in",
    "tokens_out",
    "cost",
    "currency",
}
"""What results.json holds, and its "judge"."""
QUESTION = {"question_id": whole_number, "category": text, "turns": lambda turns: bool(turns) and texts(turns)}
ANSWER = {"question_id": whole_number, "answer_id": text, "choices": lambda choices: texts(choices[0]["turns"])}
REPLY = {
    "index": whole_number,
    "sample": whole_number,
    "prompt": text,
    "response": text,
    "tokens": lambda tokens: isinstance(tokens, list),
    "finish": text,
    "gold": lambda gold: gold is None or number(gold),
}
JUDGMENT = {
    "question_id": whole_number,
    "turn": whole_number,
    "score": number,
    **dict.fromkeys(("model", "judgment", "judge_id", "answer_id"), text),
}
PAIR = {
    "question_id": whole_number,
    "turn": whole_number,
    "answer_ids": texts,
    **dict.fromkeys(("model_1", "model_2", "g1_winner", "g2_winner", "g1_judgment", "g2_judgment", "judge_id"), text),
}
"""Fields of a row that the report shows, and of what kind they are; rows without them, e.g. of
other tools, are left out."""


@dataclass(frozen=True)
class Attempt:
    started: float
    ended: float | None
    """Seconds since 1970; None where the ledger has no end of it."""


@dataclass(frozen=True)
class StageFolder:
    name: str
    folder: Path
    metrics: list[dict]
    config: dict
    status: dict
    manifest: dict
    """DONE.json."""
    attempts: list[Attempt]

    @property
    def seconds(self) -> float | None:
        """All attempts together; None where no attempt has a beginning and an end."""
        known = [attempt.ended - attempt.started for attempt in self.attempts if attempt.ended is not None]
        return sum(known) if known else None


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation left behind (eval/evaluation.py)."""

    folder: Path
    results: dict
    questions: list[dict]
    answers: dict[str, list[dict]]
    replies: dict[str, list[dict]]
    judgments: list[dict]
    pairs: list[dict]


@dataclass(frozen=True)
class Run:
    name: str
    folder: Path
    config: dict
    """The run's config.json, {} where there is none."""
    stages: list[StageFolder] = field(default_factory=list)
    """In the order in which they were first started."""
    evaluation: Evaluation | None = None
    damaged: list[str] = field(default_factory=list)
    """What could not be read of it, a sentence each."""


def read_json(path: Path) -> dict:
    """The object in a file; {} where it is absent, torn or something else."""
    return foreign.table(path)


def lines(path: Path) -> list[dict]:
    """Objects of a JSON-lines file; a line torn by a kill is left out, an absent file has none."""
    return foreign.rows(path)


def metrics(folder: str | Path) -> list[dict]:
    """Rows of a stage's metrics.jsonl."""
    return lines(Path(folder) / "metrics.jsonl")


def collect(folder: str | Path) -> Run:
    """The run, or the evaluation on its own, in ``folder``; DataError where there is neither."""
    folder, damaged = Path(folder), []
    name = folder.resolve().name
    if is_evaluation(folder):
        return Run(name, folder, {}, [], _whole_evaluation(folder, damaged), damaged)
    config = foreign.table(folder / "config.json", damaged)
    if wrong := [key for key, value in config.items() if not isinstance(value, dict)]:
        damaged.append(f"{folder / 'config.json'}: {', '.join(wrong)}: expected tables, left out")
    stages = _stages(folder, damaged)
    if not stages and not config:
        broken = "results.json is damaged: make the evaluation again, its answers are kept"
        raise DataError(
            f"{folder}: neither a run (no config.json, no stages) nor an evaluation "
            f"({broken if (folder / 'results.json').exists() else 'no results.json'})"
        )
    found = [stage.folder for stage in stages if is_evaluation(stage.folder)]
    judged = None
    try:
        judged = _whole_evaluation(found[-1], damaged) if found else None
    except DataError as error:
        damaged.append(f"The evaluation is left out: {error}")
    return Run(name, folder, {key: value for key, value in config.items() if key not in wrong}, stages, judged, damaged)


def is_evaluation(folder: Path) -> bool:
    return {"questions", "models", "heldout", "checks", "judge"} <= read_json(folder / "results.json").keys()


def _whole_evaluation(folder: Path, damaged: list[str]) -> Evaluation:
    """``evaluation``; DataError also where it can't be read for what no one thought of."""
    try:
        return evaluation(folder, damaged)
    except DataError:
        raise
    except Exception as error:  # noqa: BLE001 - whatever its files hold, the rest of the run is shown
        raise DataError(
            f"{folder / 'results.json'} is damaged: make the evaluation again, its answers are kept "
            f"({type(error).__name__}: {error})"
        ) from None


def evaluation(folder: Path, damaged: list[str]) -> Evaluation:
    """Raises DataError for results that lack what today's hold."""
    results = read_json(folder / "results.json")
    if not all(isinstance(results[name], dict) for name in ("models", "heldout", "checks")):
        raise DataError(f"{folder / 'results.json'} is damaged: make the evaluation again, its answers are kept")
    judged_by = results["judge"] if isinstance(results["judge"], dict) else {}
    if absent := sorted(RESULTS - results.keys()) or sorted(f"judge.{name}" for name in JUDGE - judged_by.keys()):
        raise DataError(
            f"{folder / 'results.json'}: no {', '.join(absent)}: made by "
            "an older version; run mtbench again, what is made is kept"
        )

    # Absent before there was mtbench.reward_model, the last two for longer.
    results["heldout"] = {"score": {}, "win_rate": {}, "length_controlled": {}, "scored_by": {}} | results["heldout"]

    def rows(path: Path, kinds: dict) -> list[dict]:
        if not foreign.inside(folder, path):
            damaged.append(f"{folder / 'results.json'}: {str(path)!r:.200} leads out of the folder: not read")
            return []
        return foreign.rows(path, kinds, damaged)

    answers = {
        name: sorted(
            _last(rows(folder / "model_answer" / f"{name}.jsonl", ANSWER), "question_id").values(),
            key=lambda row: row["question_id"],
        )
        for name in results["models"]
    }
    replies = {
        name: list(_last(rows(folder / "heldout" / f"{name}.jsonl", REPLY), "index", "sample").values())
        for name in results["models"]
    }
    answer_ids = {row["answer_id"] for given in answers.values() for row in given}
    judged = judged_by["requested"]
    judgments = rows(Path(single.judgment_path(str(folder), judged)), JUDGMENT) if judged else []
    pairs = rows(Path(single.judgment_path(str(folder), judged, "pair")), PAIR) if judged else []
    return Evaluation(
        folder,
        results,
        rows(folder / "question.jsonl", QUESTION),
        answers,
        replies,
        [row for row in judgments if row["answer_id"] in answer_ids],
        [row for row in pairs if set(row["answer_ids"]) <= answer_ids],
    )


def _last(rows: Sequence[Mapping], *names: str) -> dict:
    """The last row for each value of ``names``."""
    return {tuple(row[name] for name in names): row for row in rows}


def _stages(folder: Path, damaged: list[str]) -> list[StageFolder]:
    """Every folder in which a stage has left something, in the order of the first start."""
    events = foreign.rows(folder / "ledger.jsonl", {"event": text}, damaged)
    order = {
        name: place
        for place, name in enumerate(
            dict.fromkeys(
                event["stage"]
                for event in events
                if event["event"] in ("started", "reused") and text(event.get("stage"))
            )
        )
    }
    names = ("metrics.jsonl", "status.json", "DONE.json", "results.json")
    places = (
        [path for path in sorted(folder.iterdir()) if path.is_dir() and any((path / name).exists() for name in names)]
        if folder.is_dir()
        else []
    )
    if outside := [path for path in places if not foreign.inside(folder, path)]:
        damaged += [f"{path} is a link out of the run's folder: left out" for path in outside]
    found = [_stage(path, events, damaged) for path in places if path not in outside]
    found = [one for one in found if one.name in order or one.status or one.metrics or is_evaluation(one.folder)]
    return sorted(found, key=lambda one: (order.get(one.name, len(order)), one.name))


def _stage(path: Path, events: Sequence[Mapping], damaged: list[str]) -> StageFolder:
    config, status, done = (foreign.table(path / name, damaged) for name in ("config.json", "status.json", "DONE.json"))
    foreign.table(path / "results.json", damaged)
    measured = foreign.rows(path / "metrics.jsonl", None, damaged) + foreign.rows(
        path / "rescored.jsonl", None, damaged
    )
    return StageFolder(path.name, path, measured, config, status, done, _attempts(events, path.name))


def _attempts(events: Sequence[Mapping], stage: str) -> list[Attempt]:
    """Starts of a stage in the ledger, each with the next event that ends it."""
    own_events = [event for event in events if event.get("stage") == stage and foreign.fits(event.get("time"), number)]
    found = []
    for place, event in enumerate(own_events):
        if event.get("event") == "started":
            after = next(
                (later for later in own_events[place + 1 :] if "class" in later or later.get("event") == "started"),
                None,
            )
            ended = after["time"] if after and "class" in after else None
            found.append(Attempt(event["time"], ended))
    return found
