"""A run's folder as the report reads it. Nothing in it is taken for granted: what is absent or torn is left out.

Which stages there are, their names, their order and what they measured is what the folder says, not what this file knows.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from eval import judge
from eval.errors import DataError

RESULTS = {"questions", "template", "models", "baseline", "seed", "max_new_tokens", "judge", "scores", "pairwise", "heldout", "checks",
           "reward_model", "harness", "harness_problem", "versions"}
JUDGE = {"kind", "requested", "returned", "problem", "repeats", "requests", "tokens_in", "tokens_out", "cost", "currency"}
"""What results.json holds, and its "judge"."""
QUESTION = {"question_id", "category", "turns"}
ANSWER = {"question_id", "answer_id", "choices"}
REPLY = {"index", "sample", "prompt", "response", "tokens", "finish", "gold"}
JUDGMENT = {"question_id", "model", "turn", "score", "judgment", "judge_id", "answer_id"}
PAIR = {"question_id", "model_1", "model_2", "turn", "g1_winner", "g2_winner", "g1_judgment", "g2_judgment", "judge_id", "answer_ids"}
"""Fields of a row that the report shows; rows without them, e.g. of other tools, are left out."""


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
    """What an evaluation left behind (eval/__main__.py)."""

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


def read_json(path: Path) -> dict:
    """The object in a file; {} where it is absent, torn or something else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def lines(path: Path) -> list[dict]:
    """Objects of a JSON-lines file; a line torn by a kill is left out, an absent file has none."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    rows = []
    for line in text.split("\n"):  # splitlines would cut at U+2028, too, which JSON may hold within a string
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def metrics(folder: str | Path) -> list[dict]:
    """Rows of a stage's metrics.jsonl."""
    return lines(Path(folder) / "metrics.jsonl")


def collect(folder: str | Path) -> Run:
    """The run, or the evaluation on its own, in ``folder``; DataError where there is neither."""
    folder = Path(folder)
    name = folder.resolve().name
    if is_evaluation(folder):
        return Run(name, folder, {}, [], evaluation(folder))
    config = read_json(folder / "config.json")
    stages = _stages(folder)
    if not stages and not config:
        broken = "results.json is damaged: make the evaluation again, its answers are kept"
        raise DataError(f"{folder}: neither a run (no config.json, no stages) nor an evaluation "
                        f"({broken if (folder / 'results.json').exists() else 'no results.json'})")
    found = [stage.folder for stage in stages if is_evaluation(stage.folder)]
    return Run(name, folder, config, stages, evaluation(found[-1]) if found else None)


def is_evaluation(folder: Path) -> bool:
    return {"questions", "models", "heldout", "checks", "judge"} <= read_json(folder / "results.json").keys()


def evaluation(folder: Path) -> Evaluation:
    """Raises DataError for results that lack what today's hold."""
    results = read_json(folder / "results.json")
    if not all(isinstance(results[name], dict) for name in ("models", "heldout", "checks")):
        raise DataError(f"{folder / 'results.json'} is damaged: make the evaluation again, its answers are kept")
    judged_by = results["judge"] if isinstance(results["judge"], dict) else {}
    if absent := sorted(RESULTS - results.keys()) or sorted(f"judge.{name}" for name in JUDGE - judged_by.keys()):
        raise DataError(f"{folder / 'results.json'}: no {', '.join(absent)}: made by an older version; run mtbench again, "
                        "what is made is kept")

    # Absent before there was mtbench.reward_model, the last two for longer.
    results["heldout"] = {"score": {}, "win_rate": {}, "length_controlled": {}, "scored_by": {}} | results["heldout"]

    def rows(path: Path, fields: set[str]) -> list[dict]:
        return [row for row in lines(path) if fields <= row.keys()]

    answers = {name: sorted(_last(rows(folder / "model_answer" / f"{name}.jsonl", ANSWER), "question_id").values(),
                            key=lambda row: row["question_id"]) for name in results["models"]}
    replies = {name: list(_last(rows(folder / "heldout" / f"{name}.jsonl", REPLY), "index", "sample").values())
               for name in results["models"]}
    made = {row["answer_id"] for given in answers.values() for row in given}
    judged = judged_by["requested"]
    judgments = rows(judge.judgment_path(str(folder), judged), JUDGMENT) if judged else []
    pairs = rows(judge.judgment_path(str(folder), judged, "pair"), PAIR) if judged else []
    return Evaluation(folder, results, rows(folder / "question.jsonl", QUESTION), answers, replies,
                      [row for row in judgments if row["answer_id"] in made],
                      [row for row in pairs if set(row["answer_ids"]) <= made])


def _last(rows: Sequence[Mapping], *names: str) -> dict:
    """The last row for each value of ``names``."""
    return {tuple(row[name] for name in names): row for row in rows}


def _stages(folder: Path) -> list[StageFolder]:
    """Every folder in which a stage has left something, in the order of the first start."""
    events = lines(folder / "ledger.jsonl")
    order = {name: place for place, name in enumerate(dict.fromkeys(
        event["stage"] for event in events if event.get("event") in ("started", "reused") and "stage" in event))}
    names = ("metrics.jsonl", "status.json", "DONE.json", "results.json")
    places = [path for path in sorted(folder.iterdir()) if path.is_dir() and any((path / name).is_file() for name in names)] \
        if folder.is_dir() else []
    places = [path for path in places if path.name in order or read_json(path / "status.json") or metrics(path) or is_evaluation(path)]
    return [StageFolder(path.name, path, metrics(path) + lines(path / "rescored.jsonl"), read_json(path / "config.json"),
                        read_json(path / "status.json"), read_json(path / "DONE.json"), _attempts(events, path.name))
            for path in sorted(places, key=lambda path: (order.get(path.name, len(order)), path.name))]


def _attempts(events: Sequence[Mapping], stage: str) -> list[Attempt]:
    """Starts of a stage in the ledger, each with the next event that ends it."""
    mine = [event for event in events if event.get("stage") == stage and isinstance(event.get("time"), int | float)]
    found = []
    for place, event in enumerate(mine):
        if event.get("event") == "started":
            after = next((later for later in mine[place + 1:] if "class" in later or later.get("event") == "started"), None)
            ended = after["time"] if after and "class" in after else None
            found.append(Attempt(event["time"], ended))
    return found
