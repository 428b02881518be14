"""DONE.json: what a finished stage left behind, and the child's check of it before any rank starts.

A child reads every byte of its parents' outputs, several files at a time: a size or a date says
nothing about a flipped bit. Only later attempts of the same child skip files that were not touched
since (size, inode, times of the last change of content and of anything else, which no program can
set back): ``verified.json`` in the child's folder remembers them.
"""

from __future__ import annotations

import contextlib
import os
import platform
import subprocess
import time
from pathlib import Path

from launcher.config.stages import Stage, remaining
from launcher.run import records
from launcher.run.folder import Run, hash_of, iteration_folder, write_json
from training.checkpoint.checksums import NAME, check, digests, touched
from training.errors import Damaged
from training.files.safe_files import Unfit, read_table, within


class Refused(RuntimeError):
    """A stage must not be called done, or a parent must not be used; the message says why."""


class DamagedOutput(Refused):
    """A stage's own outputs are not what it saved."""


def make(run: Run, stage: Stage, attempt: int, started: float, left: Path | None = None) -> dict:
    """The manifest of a stage whose ranks all exited 0; raises Refused where an output is missing
    or nothing was trained.

    ``left``: where its first rank left its versions.
    """
    iteration = run.iteration(stage.name)
    if stage.checkpoints and iteration is None:
        raise Refused(f"{stage.name} exited 0 but left no file `latest`: it saved no checkpoint")
    if stage.trainer and iteration == 0:
        raise Refused(
            f"{stage.name} exited 0 at iteration 0: it trained nothing "
            f"(see counts.json in {run.folder / 'data'} for empty data)"
        )
    last_iteration = read_table(run.stage(stage.name) / "config.json")["iterations"] if stage.trainer else iteration
    chosen = _chosen(run, stage, last_iteration)
    if iteration != (chosen["iteration"] if chosen else last_iteration):
        raise Refused(f"{stage.name} exited 0 at iteration {iteration} of {last_iteration}: it did not finish")
    files = _outputs(run, stage, iteration)
    sums = _sums(stage, files)
    identity = {
        "stage": stage.name,
        "iteration": iteration,
        "config_hash": config_hash(run, stage.name),
        "parents": {parent: read(run, parent)["identity"] for parent in stage.parents},
        "outputs": {
            str(path.relative_to(run.folder)): {"size": path.stat().st_size, "sha256": sums[path]} for path in files
        },
    }
    return {
        "identity": hash_of(identity),
        **identity,
        "run": run.id,
        "attempt": attempt,
        "started": started,
        "ended": time.time(),
        "versions": versions(run, left),
        **({"chosen": chosen} if chosen else {}),
    }


def _sums(stage: Stage, outputs: list[Path]) -> dict[Path, str]:
    """sha256 of each output, each read once. Raises Refused where a checkpoint is not what its
    SHA256 says: a bit that flipped after the save would be certified."""
    sums: dict[Path, str] = {}
    for folder in {path.parent for path in outputs if path.name == NAME}:
        try:
            sums |= {folder / name: sha256 for name, sha256 in check(folder).items()}
        except Damaged as error:
            raise DamagedOutput(
                f"{stage.name} can't be called done: {error.what}; resume goes on from the checkpoint before it"
            ) from None
    return sums | digests("", [path for path in outputs if path not in sums])


def _chosen(run: Run, stage: Stage, last_iteration: int | None) -> dict | None:
    """What a trainer with early stop said when it ended (training/checkpoint/stage_folder.py):
    patience had run out, or all iterations were run, and an earlier checkpoint than the last is the
    result. None where it said nothing, as one that died does."""
    path = run.stage(stage.name) / "chosen.json"
    if not stage.trainer or not path.exists():
        return None
    try:
        early_stop = read_table(path)
    except Unfit as error:
        raise Refused(f"{stage.name} can't be called done: {error}") from None
    if not all(records.is_whole(early_stop.get(name)) for name in ("misses", "patience", "ended", "iteration")):
        raise Refused(f"{stage.name} can't be called done: {path} is damaged")
    return (
        early_stop if early_stop["misses"] >= early_stop["patience"] or early_stop["ended"] == last_iteration else None
    )


def write(run: Run, stage: Stage, manifest: dict) -> None:
    """The last file that a stage gets."""
    write_json(run.stage(stage.name) / "DONE.json", manifest)


def read(run: Run, stage: str) -> dict:
    """A stage's manifest; raises Refused where there is none, it can't be read or it holds what
    none of ours does."""
    path = run.stage(stage) / "DONE.json"
    try:
        return records.manifest(read_table(path), path)
    except (FileNotFoundError, NotADirectoryError):
        raise Refused(f"{stage} is not done: {path} does not exist") from None
    except Unfit as error:
        raise Refused(f"{error}; remove it and resume: {stage} then checks its outputs again") from None


def outputs(run: Run, manifest: dict) -> dict[Path, dict]:
    """Path -> {"size", "sha256"} of what a manifest lists; raises Refused for a name that is not
    below the run's folder."""
    try:
        return {within(run.folder, name): expected for name, expected in manifest["outputs"].items()}
    except Unfit as error:
        raise Refused(f"{manifest['stage']}/DONE.json lists what is none of this run's: {error}") from None


def verify(run: Run, stage: Stage, child: str | None = None) -> None:
    """Raise Refused with the reason unless the stage is done and its outputs are what its manifest
    says.

    ``child``: the stage that is to use them; its verified.json spares files that an earlier attempt
    of it has read.
    """
    manifest = read(run, stage.name)
    if manifest["run"] != run.id:
        raise Refused(f"{stage.name}/DONE.json is of run {manifest['run']}, not of {run.id}")
    if manifest["config_hash"] != config_hash(run, stage.name):
        raise Refused(f"{stage.name} was done with another config.json than the one that is there now")
    if stage.trainer and not manifest["iteration"]:
        raise Refused(f"{stage.name} is marked done at iteration {manifest['iteration']}: it trained nothing")
    if manifest["identity"] != hash_of({key: manifest[key] for key in IDENTITY}):
        raise Refused(f"{stage.name}/DONE.json was changed by hand: its identity is not the hash of its content")
    _check_parents(run, stage, manifest)
    for path, expected in outputs(run, manifest).items():
        if not path.is_file():
            raise Refused(f"{stage.name} is marked done but {path} is missing")
        if path.stat().st_size != expected["size"]:
            raise Refused(
                f"{path} has {path.stat().st_size} bytes, its manifest "
                f"says {expected['size']}: truncated or overwritten"
            )
    _check_content(run, manifest, run.stage(child) / "verified.json" if child else None)


IDENTITY = ("stage", "iteration", "config_hash", "parents", "outputs")
"""What a manifest's identity is the hash of."""


def _check_parents(run: Run, stage: Stage, manifest: dict) -> None:
    """Raise Refused where the stage was made from other parents than those that are there: the
    chain would mix two runs."""
    for parent in stage.parents:
        now = read(run, parent)["identity"]
        if manifest["parents"].get(parent) != now:
            raise Refused(
                f"{stage.name} was made from another {parent} than the one that is there now; "
                f"python -m launcher resume {run.folder} moves it aside and runs it again"
            )


def _check_content(run: Run, manifest: dict, memory: Path | None) -> None:
    try:
        known = read_table(memory) if memory else {}
    except (FileNotFoundError, Unfit):
        known = {}
    seen = {path: [expected["sha256"], *touched(path)] for path, expected in outputs(run, manifest).items()}
    unread = [path for path in seen if str(path) not in known or known[str(path)] != seen[path]]
    for path, sha256 in digests("", unread).items():
        if sha256 != seen[path][0]:
            raise Refused(f"{path} does not have the sha256 of its manifest: its content changed")
    if memory and unread:
        write_json(memory, {**known, **{str(path): seen[path] for path in unread}})


def left(run: Run, stages: list[Stage], damaged: dict[str, str] | None = None) -> list[Stage]:
    """Those of ``stages`` that are not done, judged by the manifests.

    A damaged manifest raises Refused. With a dict ``damaged``, its stage counts as not done, and
    the dict gets stage -> reason.
    """
    manifests = {}
    for name, stage in run.stages.items():
        if not (run.stage(name) / "DONE.json").exists():
            continue
        try:
            manifest = read(run, name)
            files = outputs(run, manifest)
        except Refused as error:
            if damaged is None:
                raise
            damaged[name] = str(error)
            continue
        # What is made from a checkpoint is made again where it was lost; a lost checkpoint is
        # the child's to refuse, by name.
        if stage.checkpoints or all(path.is_file() for path in files):
            manifests[name] = manifest
    return remaining(
        run.stages,
        stages,
        {name: manifest["identity"] for name, manifest in manifests.items()},
        {name: manifest["parents"] for name, manifest in manifests.items()},
    )


def config_hash(run: Run, stage: str) -> str:
    return hash_of(read_table(run.stage(stage) / "config.json"))


VERSIONS, MOST_VERSIONS = "versions.json", 20


def versions(run: Run, left: Path | None = None) -> dict[str, str]:
    """Versions of what computed the outputs, as the stage's first rank said them.

    Where it said nothing they are read from this interpreter's packages: importing torch would cost
    seconds. A container does not use these: then only its image is named.
    """
    import importlib.metadata  # late: 40 ms, and status needs this file

    box = run.config["profile"].get("container") or {}
    image = {"container": box["image"]} if box.get("runtime", "none") != "none" else {}
    versions = {} if left is None else _versions(left)
    if not versions and not image:
        versions = {"python": platform.python_version()}
        for package in ("torch", "megatron-core", "transformers", "safetensors", "convoy-rlhf"):
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                versions[package] = importlib.metadata.version(package)
    return image | versions | commit(Path(__file__).resolve().parents[2])


def _versions(path: Path) -> dict[str, str]:
    """A rank's versions; {} where it left none that can be read."""
    try:
        versions = read_table(path, 1 << 16)
    except (OSError, Unfit):
        return {}
    return {str(name): str(version) for name, version in list(versions.items())[:MOST_VERSIONS]}


def commit(root: Path) -> dict[str, str]:
    """{"commit": the checkout's commit, "-dirty" where files differ from it}; {} where the code is
    installed without its repository."""
    if not (root / ".git").exists():  # else git would name a repository around the installation
        return {}
    try:
        done = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            capture_output=True,
            text=True,
            check=False,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return {}
    return {"commit": done.stdout.strip()} if done.returncode == 0 else {}


def _outputs(run: Run, stage: Stage, iteration: int | None) -> list[Path]:
    """Files that the manifest lists; raises Refused for a pattern without a file."""
    folder = run.stage(stage.name)
    files = set()
    iterations = {iteration}
    if stage.chosen_iteration and (chosen := run.config[stage.name][stage.chosen_iteration]):
        iterations.add(chosen)
    for number in iterations:
        for pattern in stage.outputs:
            pattern = pattern.format(iteration=iteration_folder(number or 0))
            matches = [Path(os.path.normpath(path)) for path in folder.glob(pattern) if path.is_file()]
            if not matches:
                raise Refused(f"{stage.name} exited 0 but {folder / pattern} is missing")
            files.update(matches)
    if stage.checkpoints:
        files.add(folder / "latest")
        for number in iterations:
            files.update(
                path for path in (folder / "checkpoints" / iteration_folder(number or 0)).rglob("*") if path.is_file()
            )
    return sorted(files)
