"""What a run's own files hold, as far as it is what the launcher writes: a torn, damaged or foreign
value is left out. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping

from training.files.safe_files import Unfit, parse

STATES = ("pending", "running", "requeued", "done", "failed", "cancelled", "stopped", "lost")
"""Of a stage, in its status.json."""


def number(value: object) -> bool:
    """Whether this is a number that can be counted and shown as a time, a count or a measure."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and abs(value) < 1e15


def moment(value: object) -> bool:
    """Whether this is a time in seconds since 1970 that a date can be made of."""
    return number(value) and 0 <= value < 1e11


def is_whole(value: object) -> bool:
    return isinstance(value, int) and number(value)


def text(value: object) -> bool:
    return isinstance(value, str)


def texts(value: object) -> bool:
    return isinstance(value, list) and all(map(text, value))


def _jobs(value: object) -> bool:
    return (
        all(map(is_whole, value.values() if isinstance(value, dict) else value))
        if isinstance(value, dict | list)
        else False
    )


SHARED: dict[str, Callable[[object], bool]] = {
    "stage": text,
    "job": is_whole,
    "attempt": is_whole,
    "pid": is_whole,
    "pid_start": is_whole,
    "host": text,
    "iteration": is_whole,
    "class": text,
    "cause": text,
    "began": is_whole,
}
"""Field of a record -> whether its value is of the kind that we write; None is of every kind."""
EVENT = {
    **SHARED,
    "event": text,
    "time": moment,
    "stages": texts,
    "jobs": _jobs,
    "token": text,
    "node": text,
    "reason": text,
    "element": is_whole,
}
STATUS = {
    **SHARED,
    "state": STATES.__contains__,
    "started": moment,
    "ended": moment,
    "updated": moment,
    "advice": text,
    "rank": is_whole,
    "lines": texts,
    "run": text,
}
NEEDED = {
    "runner": ("pid", "host", "stages"),
    "submitting": ("token", "stages"),
    "committed": ("token",),
    "submitted": ("stage", "job"),
    "started": ("stage",),
    "requeued": ("stage",),
    "done": ("stage", "attempt"),
    "bad node": ("node",),
}
"""Event -> fields without which it says nothing."""


def events(content: str) -> list[dict]:
    """The events of a ledger, in order; a line that is torn, or that no launcher writes, is left
    out."""
    sound = []
    for line in content.split("\n")[:-1]:
        try:
            event = parse(line, "a line")
        except Unfit:
            continue
        if (
            isinstance(event, dict)
            and _fits(event, EVENT)
            and None not in (event.get("event"), event.get("time"))
            and all(event.get(name) is not None for name in NEEDED.get(event["event"], ()))
        ):
            sound.append(event)
    return sound


def status(value: object, source: object) -> dict:
    """What a status.json held; raises Unfit, naming ``source``, where it is not what a supervisor
    writes."""
    if not isinstance(value, dict):
        raise Unfit(f"{source}: expected an object, got {type(value).__name__}")
    wrong = sorted(name for name, kind in STATUS.items() if value.get(name) is not None and not fits(value[name], kind))
    if wrong or value.get("state") is None:
        name = (wrong or ["state"])[0]
        raise Unfit(f"{source}: {name} = {value.get(name)!r:.60} is nothing that a supervisor writes")
    if value["state"] == "running" and not value.get("job") and None in (value.get("pid"), value.get("host")):
        raise Unfit(f"{source}: running, but it names neither a job nor a process")
    return {
        **value,
        **{name: value.get(name) or empty for name, empty in (("attempt", 0), ("job", None), ("cause", ""))},
    }


def wrong_in_config(values: dict, pipelines: Collection[str]) -> str:
    """What of a config.json is not as submit writes it, in words; "" where it has all that
    every run has."""
    for section in ("run", "profile"):
        if not isinstance(values.get(section), dict):
            return f"no table {section}"
    for section, key in (("run", "id"), ("run", "profile"), ("profile", "scheduler"), ("run", "folder")):
        value = values[section].get(key, "" if key == "folder" else None)
        if not text(value):
            return f"{section}.{key} = {value!r:.60}"
    about = values["run"]
    if not fits(about.get("pipeline", next(iter(pipelines))), pipelines.__contains__):
        return f"run.pipeline = {about['pipeline']!r:.60}"
    if about.get("selected") is not None and not texts(about["selected"]):
        return f"run.selected = {about['selected']!r:.60}"
    index = about["sweep"].get("index") if isinstance(about.get("sweep"), dict) else about.get("sweep", 0)
    return "" if is_whole(index) else f"run.sweep = {about['sweep']!r:.60}"


def sweep(values: dict, source: object) -> dict:
    """What a sweep.json held; raises Unfit, naming ``source``, where it is not what submit
    writes."""
    rows = values.get("values")
    if (
        not text(values.get("id"))
        or not isinstance(rows, list)
        or not rows
        or not all(isinstance(row, dict) and row and row.keys() == rows[0].keys() for row in rows)
    ):
        raise Unfit(f"{source}: expected id and values, a table of keys for each run")
    return values


def manifest(values: dict, source: object) -> dict:
    """What a DONE.json held; raises Unfit, naming ``source``, where it is not what the launcher
    writes. Its names are not checked."""
    parents, outputs = values.get("parents"), values.get("outputs")
    wrong = [name for name in ("identity", "stage", "run", "config_hash") if not text(values.get(name))]
    wrong += [] if values.get("iteration") is None or fits(values["iteration"], is_whole) else ["iteration"]
    wrong += [] if isinstance(parents, dict) and all(map(text, parents.values())) else ["parents"]
    wrong += (
        []
        if isinstance(outputs, dict)
        and all(
            isinstance(row, dict) and fits(row.get("size"), is_whole) and text(row.get("sha256"))
            for row in outputs.values()
        )
        else ["outputs"]
    )
    if wrong:
        raise Unfit(f"{source} is not what a finished stage leaves: {wrong[0]} = {values.get(wrong[0])!r:.60}")
    return values


def _fits(values: Mapping, kinds: Mapping[str, Callable[[object], bool]]) -> bool:
    return all(value is None or name not in kinds or fits(value, kinds[name]) for name, value in values.items())


def fits(value: object, kind: Callable[[object], bool]) -> bool:
    """Whether a value is of a kind, whatever it is."""
    try:
        return kind(value)
    except (TypeError, OverflowError):  # a list is in no tuple by hash; 10**400 is no float
        return False
