"""Finished stages of another run in place of one's own: ``submit --reuse RUN``, for branches that
start from one SFT or reward model.

A stage is taken where its section is the same, its training and held-out rows and the starting
model are the same bytes, and all its parents were taken. What its manifest lists is checked byte
for byte, then linked (copied onto another file system); its numbers come along, its logs stay where
they are. The new run has a manifest of its own, which names the run that it comes from.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from pathlib import Path

from launcher.config.stages import Graph, Stage, model_folder, stage_config
from launcher.run import manifest
from launcher.run.folder import Run, hash_of
from training.checkpoint.checksums import digests
from training.errors import ConfigError


def candidates(source: Run, run: Path, tables: dict, graph: Graph) -> list[str]:
    """Stages whose configuration is the one of ``source``, where they are done, as far as can be
    known before the data is prepared. ConfigError, with the keys that differ, where there is
    none."""
    source.check_here()
    left = {stage.name for stage in manifest.left(source, list(source.stages.values()))}
    reusable: list[str] = []
    for name, stage in graph.items():
        if (
            stage.checkpoints
            and name not in left
            and source.stages.get(name) == stage
            and set(stage.parents) <= set(reusable)
            and _settings(source.folder, source.config, source.stages, name) == _settings(run, tables, graph, name)
        ):
            reusable.append(name)
    if not reusable:
        raise ConfigError(
            f"--reuse {source.folder}: no stage of it is both done and configured as here; `report` of two runs shows "
            "what differs in their configurations"
        )
    return reusable


def takeable(run: Run, source: Run) -> list[str]:
    """Every stage of ``source`` that fits ``run``, whose data is prepared, and that the run has
    not begun, or has taken before.
    Raises manifest.Refused where what ``source`` holds is damaged. Writes nothing."""
    names: list[str] = []
    for name in candidates(source, run.folder, run.config, run.stages):
        stage = run.stages[name]
        if (run.stage(name) / "DONE.json").exists():
            names.append(name)
        elif set(stage.parents) <= set(names) and not run.status(name)["attempt"] and _same_inputs(run, source, stage):
            manifest.verify(source, stage)
            names.append(name)
    return names


def take(run: Run, source: Run, names: list[str]) -> None:
    """Take the ``takeable`` stages that the run does not have yet."""
    for name in names:
        if not (run.stage(name) / "DONE.json").exists():
            _link(run, source, run.stages[name])


def _settings(folder: Path, tables: dict, graph: Graph, name: str) -> dict:
    return {**dataclasses.asdict(stage_config(folder, tables, graph, name)), "paths": None}


def _same_inputs(run: Run, source: Run, stage: Stage) -> bool:
    """Whether the stage reads the same bytes in both: the rows of a trainer, the model of the
    conversion."""
    if not stage.trainer:
        return _bytes(Path(model_folder(run.folder, run.config))) == _bytes(
            Path(model_folder(source.folder, source.config))
        )
    here, there = (stage_config(one.folder, one.config, one.stages, stage.name).paths for one in (run, source))
    return all(_bytes(Path(getattr(here, key))) == _bytes(Path(getattr(there, key))) for key in ("train", "heldout"))


def _bytes(path: Path) -> dict[str, str]:
    """Name -> sha256 of a file, or of the files of a folder."""
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    return {file.name: digest for file, digest in digests("", [file for file in files if file.is_file()]).items()}


def _link(run: Run, source: Run, stage: Stage) -> None:
    """The stage's outputs and numbers into ``run``; its manifest last."""
    old, here, there = manifest.read(source, stage.name), run.stage(stage.name), source.stage(stage.name)
    for path, target in zip(manifest.outputs(source, old), manifest.outputs(run, old), strict=True):
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        try:
            if path.stat().st_uid != os.geteuid():  # its owner could still change what is linked
                raise PermissionError
            os.link(path, target)
        except OSError:  # another user's, another file system, or one without links
            shutil.copy2(path, target)
    for path in there.iterdir():
        if (
            path.is_file()
            and not path.is_symlink()
            and path.name not in ("config.json", "status.json", "verified.json", "latest")
            and not path.name.startswith("DONE.json")
        ):
            shutil.copy2(path, here / path.name)
    status = source.status(stage.name)
    run.record("reused", stage=stage.name, run_reused=source.id, folder=str(source.folder))
    run.write_status(
        stage.name,
        state="done",
        attempt=1,
        iteration=old["iteration"],
        job=None,
        **{key: status.get(key) for key in ("started", "ended")},
    )
    identity = {
        **{key: old[key] for key in manifest.IDENTITY},
        "config_hash": manifest.config_hash(run, stage.name),
        "parents": {parent: manifest.read(run, parent)["identity"] for parent in stage.parents},
    }
    manifest.write(
        run,
        stage,
        {
            **old,
            "identity": hash_of(identity),
            **identity,
            "run": run.id,
            "reused": {"run": source.id, "folder": str(source.folder), "identity": old["identity"]},
        },
    )
