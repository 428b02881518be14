"""The rows that a run trains on: prepared once, from input files that are known by their content.

``data/DONE.json`` of a run says what its rows were made from: the configuration's hash, and the
sha256 of each file of rows, of all its bytes: two that differ in one row give other rows. Weights
are known by their length and blocks of them. Size, inode and times spare the reading of a file that
was not written since. So an unchanged file of ten million rows costs one look, and one that was
written is read once before it is compared.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
from collections.abc import Collection
from pathlib import Path

from launcher import run_module
from launcher.config import environment
from launcher.config.stages import Stage, prepare_config, stage_config
from launcher.run.folder import SUMMARY, Failed, Run, hash_of, write_json, write_text
from launcher.status import state
from training.checkpoint.checksums import same
from training.errors import ConfigError
from training.files.safe_files import read_table, within

WEIGHTS = " of model.checkpoint"
"""In the name of an input that the weights are converted from."""


def prepare(run: Run, keep: bool = False, restarted: Collection[str] = ()) -> list[str]:
    """Make the run's rows, unless they are what its configuration and input files give.

    Where an input changed after a stage had used its rows, the old rows stay with ``keep``, and the
    answer says so, a line each. Stages of ``restarted`` begin from nothing: they may read others.
    Raises ConfigError for bad data, and without ``keep`` where a stage has used other rows."""
    marker = run.folder / "data" / "DONE.json"
    config = dataclasses.asdict(prepare_config(run.folder, run.config))
    old = _old(run)
    if old and old["config_hash"] == hash_of(config):
        changed, complete = _changed(old), _complete(run, old)
        if not changed and complete:
            return []
        if changed and (used := _users(run, changed, restarted)):
            if not keep or not complete:
                raise ConfigError(_refusal(run, changed, used))
            return [
                f"{', '.join(changed)} changed after {', '.join(used)} had used what was there before: "
                "the run goes on with that; to train on the new: "
                f"python -m launcher resume {run.folder} --from {used[0]}, or a run with another --name"
            ]
    counts = _prepare(run, config)
    files = {path.name: path.stat().st_size for path in sorted((run.folder / "data").glob("*.jsonl"))}
    write_json(marker, {"config_hash": hash_of(config), "inputs": counts["inputs"], "files": files})
    return []


def check(run: Run) -> None:
    """ConfigError where ``prepare`` would say that a stage has used other rows. Writes nothing."""
    if (old := _old(run)) and (changed := _changed(old)) and (used := _users(run, changed)):
        raise ConfigError(_refusal(run, changed, used))


def check_rows(run: Run, stages: list[Stage]) -> None:
    """ConfigError where a stage would find no row: not every source has replies, or two to
    compare."""
    counts = read_counts(run)
    rows = counts["files"]
    unread = [name.removeprefix("not read: ") for name in counts["read"] if name.startswith("not read: ")]
    for stage in stages:
        paths = stage_config(run.folder, run.config, run.stages, stage.name).paths
        for key in ("train", "heldout") if stage.trainer else ():
            name = Path(getattr(paths, key)).name
            if not rows[name]:
                also = f"; nothing reads {', '.join(unread)}" if unread else ""
                raise ConfigError(
                    f"data.source = {run.config['data']['source']!r} gives {name}, which the {stage.name} "
                    "stage reads, no row; sft needs rows with a reply, reward and dpo rows with two or "
                    f"more to compare{also}; submit a part of the chain with --until, or give another source"
                )


def summarise(run: Run, stages: dict[str, tuple[str, str, int]]) -> list[str]:
    """What was dropped of the rows, and what ``stages`` (checks.lengths) cut of them, a line each;
    data/summary.json keeps it."""
    path = run.folder / "data" / SUMMARY
    lengths = {stage: list(length) for stage, length in stages.items()}
    known = run.data_summary()
    if known.get("stages") != lengths:
        if not any((run.folder / "data").glob("*.tokens")):
            return []
        command = run_module.command("training.data.cuts", str(run.folder / "data"), json.dumps(lengths))
        done = subprocess.run(command, env=environment.outside(), capture_output=True, text=True, check=False)
        if done.returncode:  # it is told, and stops nothing
            return [f"what is cut can't be said: {(done.stderr.strip() or 'no message').splitlines()[-1]}"]
        known = {"stages": lengths, "lines": done.stdout.splitlines()}
        write_json(path, known)
    return known["lines"]


def read_counts(run: Run) -> dict:
    """counts.json: what was read, dropped and written (training/data/prepare.py)."""
    return read_table(run.folder / "data" / "counts.json")


def _prepare(run: Run, config: dict) -> dict:
    """Run ``training.data.prepare``; its counts. ConfigError with its message for bad data, which
    leaves the rows of before."""
    folder = run.folder / "data"
    config_file = folder / "config.new.json"
    write_json(config_file, config)
    command = run_module.command("training.data.prepare", str(config_file))
    done = subprocess.run(command, env=environment.outside(), capture_output=True, text=True, check=False)
    write_text(folder / "prepare.log", done.stdout + done.stderr)
    last_line = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()[-1]
    if done.returncode:
        config_file.unlink()
    if done.returncode in (os.EX_USAGE, os.EX_DATAERR):
        raise ConfigError(f"data preparation: {last_line}")
    if done.returncode:
        raise Failed(
            f"data preparation: exit code {done.returncode}: {last_line}; all it said: {folder / 'prepare.log'}"
        )
    os.replace(config_file, folder / "config.json")
    (folder / SUMMARY).unlink(missing_ok=True)
    return read_counts(run)


def _old(run: Run) -> dict | None:
    """What the rows that are there were made from; None where no preparation has come to its
    end."""
    try:
        old = read_table(run.folder / "data" / "DONE.json")
        for known in old["inputs"].values():
            _ = known["path"] + (known.get("sha256") or known["sampled"]), [*known["touched"]]
        for name in old["files"]:
            within(run.folder / "data", name)
        return old if isinstance(old["config_hash"], str) else None
    except (OSError, ValueError, AttributeError, TypeError, KeyError):  # missing or damaged
        return None


def _complete(run: Run, old: dict) -> bool:
    """Whether the rows' files are there with all their bytes."""
    paths = {run.folder / "data" / name: size for name, size in old["files"].items()}
    there = all(path.is_file() and path.stat().st_size == size for path, size in paths.items())
    return there and (run.folder / "data" / "counts.json").is_file()


def _changed(old: dict) -> list[str]:
    """Inputs whose content is not what the rows were made from, as "data.source = 'rows.jsonl'".
    One that is gone is not looked at: its rows are there."""
    try:
        return [
            f"{key} = {known['path']!r}"
            for key, known in old["inputs"].items()
            if os.path.exists(known["path"]) and not (os.path.isfile(known["path"]) and same(known["path"], known))
        ]
    except OSError as error:
        raise ConfigError(f"{error.filename}: can't be read: {error.strerror}") from None


def _users(run: Run, changed: list[str], restarted: Collection[str] = ()) -> list[str]:
    """Stages that have begun with what changed, or are queued to, except for those of
    ``restarted``. Trainers read rows, all read weights."""
    model = any(WEIGHTS in name for name in changed)
    readers = [name for name, stage in run.stages.items() if stage.trainer or model]
    begun = [name for name in readers if run.status(name)["attempt"]]
    waiting = state.active_stages(run) if not begun and run.ledger() else []
    return [name for name in readers if name in {*begun, *waiting} - set(restarted)]


def _refusal(run: Run, changed: list[str], used: list[str]) -> str:
    return (
        f"{', '.join(changed)} changed after {', '.join(used)} of {run.folder} had begun "
        "with what was there before. "
        "Give the new content its own run with --name, train on it from the start "
        f"(python -m launcher resume {run.folder} --from {used[0]}), or go on with the old "
        f"(python -m launcher resume {run.folder})"
    )
