"""DONE.json: what a finished stage left behind, and the child's check of it before any rank starts."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import time
from pathlib import Path

from launcher.pipeline import STAGES, Stage, remaining
from launcher.run import Run, hash_of, iteration_folder, write_json

HASHED_BYTES = 64_000_000
"""A child compares sha256 of files below this size and only the size of larger ones: reading 100 GB again would cost it minutes."""


class Refused(RuntimeError):
    """A stage must not be called done, or a parent must not be used; the message says why."""


def make(run: Run, stage: Stage, attempt: int, started: float) -> dict:
    """The manifest of a stage whose ranks all exited 0; raises Refused where an output is missing or nothing was trained."""
    iteration = run.iteration(stage.name)
    if stage.checkpoints and iteration is None:
        raise Refused(f"{stage.name} exited 0 but left no file `latest`: it saved no checkpoint")
    if stage.trainer and iteration == 0:
        raise Refused(f"{stage.name} exited 0 at iteration 0: it trained nothing (see counts.json in {run.folder / 'data'} for empty data)")
    wanted = json.loads((run.stage(stage.name) / "config.json").read_text(encoding="utf-8"))["iterations"] if stage.trainer else iteration
    if iteration != wanted:
        raise Refused(f"{stage.name} exited 0 at iteration {iteration} of {wanted}: it did not finish")
    identity = {
        "stage": stage.name, "iteration": iteration, "config_hash": config_hash(run, stage.name),
        "parents": {parent: read(run, parent)["identity"] for parent in stage.parents},
        "outputs": {str(path.relative_to(run.folder)): {"size": path.stat().st_size, "sha256": _sha256(path)}
                    for path in _outputs(run, stage, iteration)}}
    return {"identity": hash_of(identity), **identity, "run": run.id, "attempt": attempt,
            "started": started, "ended": time.time(), "versions": versions()}


def write(run: Run, stage: Stage, manifest: dict) -> None:
    """The last file that a stage gets."""
    write_json(run.stage(stage.name) / "DONE.json", manifest)


def read(run: Run, stage: str) -> dict:
    """A stage's manifest; raises Refused where there is none or it can't be read."""
    path = run.stage(stage) / "DONE.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise Refused(f"{stage} is not done: {path} does not exist") from None
    except json.JSONDecodeError as error:
        raise Refused(f"{path} is not JSON ({error}); remove it and resume: {stage} then checks its outputs again") from None


def verify(run: Run, stage: Stage) -> None:
    """Raise Refused with the reason unless the stage is done and its outputs are what its manifest says."""
    manifest = read(run, stage.name)
    if manifest["run"] != run.id:
        raise Refused(f"{stage.name}/DONE.json is of run {manifest['run']}, not of {run.id}")
    if manifest["config_hash"] != config_hash(run, stage.name):
        raise Refused(f"{stage.name} was done with another config.json than the one that is there now")
    if stage.trainer and not manifest["iteration"]:
        raise Refused(f"{stage.name} is marked done at iteration {manifest['iteration']}: it trained nothing")
    for name, expected in manifest["outputs"].items():
        path = run.folder / name
        if not path.is_file():
            raise Refused(f"{stage.name} is marked done but {path} is missing")
        if path.stat().st_size != expected["size"]:
            raise Refused(f"{path} has {path.stat().st_size} bytes, its manifest says {expected['size']}: truncated or overwritten")
        if expected["size"] < HASHED_BYTES and _sha256(path) != expected["sha256"]:
            raise Refused(f"{path} does not have the sha256 of its manifest: its content changed")


def left(run: Run, stages: list[Stage]) -> list[Stage]:
    """Those of ``stages`` that are not done, judged by the manifests."""
    manifests = {}
    for name in STAGES:
        if (run.stage(name) / "DONE.json").exists():
            manifest = read(run, name)
            # What is made from a checkpoint is made again where it was lost; a lost checkpoint is the child's to refuse, by name.
            if STAGES[name].checkpoints or all((run.folder / output).is_file() for output in manifest["outputs"]):
                manifests[name] = manifest
    return remaining(stages, {name: manifest["identity"] for name, manifest in manifests.items()},
                     {name: manifest["parents"] for name, manifest in manifests.items()})


def config_hash(run: Run, stage: str) -> str:
    return hash_of(json.loads((run.stage(stage) / "config.json").read_text(encoding="utf-8")))


def versions() -> dict:
    """Versions of what computed the outputs, read from package metadata: importing torch here would cost seconds."""
    found = {"python": platform.python_version()}
    for package in ("torch", "megatron-core", "transformers", "safetensors", "convoy-rlhf"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _outputs(run: Run, stage: Stage, iteration: int | None) -> list[Path]:
    """Files that the manifest lists; raises Refused for a pattern without a file."""
    folder = run.stage(stage.name)
    found = set()
    iterations = {iteration}
    if stage.name == "reward" and (chosen := run.config["reward"]["load_iteration"]):
        iterations.add(chosen)  # rlhf starts from this one
    for number in iterations:
        for pattern in stage.outputs:
            pattern = pattern.format(iteration=iteration_folder(number or 0))
            matches = [Path(os.path.normpath(path)) for path in folder.glob(pattern) if path.is_file()]
            if not matches:
                raise Refused(f"{stage.name} exited 0 but {folder / pattern} is missing")
            found.update(matches)
    if stage.checkpoints:
        found.add(folder / "latest")
        for number in iterations:
            found.update(path for path in (folder / "checkpoints" / iteration_folder(number or 0)).rglob("*") if path.is_file())
    return sorted(found)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
