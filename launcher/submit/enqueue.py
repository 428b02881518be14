"""Queue what is left of a run, or of a sweep's runs: which stages need a job, and the jobs."""

from __future__ import annotations

import itertools
from pathlib import Path

from launcher.config import key_file
from launcher.config.sections import build_plain
from launcher.config.stages import Stage
from launcher.run import manifest
from launcher.run.folder import Failed, Run, sweep_of, write_text
from launcher.slurm import queue as jobs
from launcher.slurm import script as sbatch
from launcher.slurm import transaction
from launcher.submit.job_array import SweepRun, array_script, members
from launcher.submit.rewind import descendants, move_stale_aside


def queue(run: Run, stages: list[Stage]) -> dict[str, int | str]:
    """Queue what is neither done nor queued already, all or none; stage -> id of the new jobs
    ("12[3]" for an element of a sweep).

    Two commands at once queue it once: the second waits for the first. What an earlier one left
    half queued is settled before.
    """
    if "sweep" in run.config["run"]:
        return dict(queue_sweep(run.folder.parent, stages, run.config["run"]["sweep"]["index"]))
    with transaction.patient(run.lock):
        transaction.settle(run)
        chain, alive = missing(run, stages, jobs.of_run(run))
        move_stale_aside(run, chain)
        resources, profile = build_plain("resources", run.config["resources"]), run.profile
        keys = key_file.names(profile)
        steps = []
        for stage in chain:
            script = _write(
                run, stage, sbatch.script(sbatch.stage_request(run, stage, getattr(resources, stage.name), profile))
            )
            waits = tuple((parent, alive[parent].id) for parent in stage.parents if parent in alive)
            steps.append(
                transaction.Step(stage.name, run.id, script, stage.parents, waits, without=keys, passed=profile.passed)
            )
        return transaction.submit(run, steps) if steps else {}


def queue_sweep(folder: Path, stages: list[Stage], only: int | None = None) -> list[tuple[str, str]]:
    """Queue what is neither done nor queued, of element ``only`` or of all: those with the same
    stages left make one array a stage.

    Returns (stage, "job[elements]") of each array.
    """
    book, said = Run(folder), []
    with transaction.patient(book.lock):
        transaction.settle(book)
        groups: dict[tuple, list[SweepRun]] = {}
        chosen = members(folder) if only is None else [members(folder)[only]]
        known = jobs.of_runs([member.run for member in chosen])
        for member in chosen:
            todo, alive = missing(member.run, stages, known[member.run.id])
            move_stale_aside(member.run, todo)
            waits = {
                parent: int(alive[parent].element.partition("_")[0])
                for stage in todo
                for parent in stage.parents
                if parent in alive
            }
            groups.setdefault((tuple(stage.name for stage in todo), tuple(waits.items())), []).append(member)
        for number, ((names, waits), held) in enumerate(groups.items()):
            if names:
                todo = [held[0].run.stages[name] for name in names]
                said += _queue_group(book, f"{number}" if len(groups) > 1 else "", todo, dict(waits), held)
    return said


def _queue_group(
    book: Run, mark: str, stages: list[Stage], waits: dict[str, int], held: list[SweepRun]
) -> list[tuple[str, str]]:
    identity, array = sweep_of(book.folder)["id"], ",".join(str(member.index) for member in held)
    steps, profile = [], held[0].run.profile
    keys, passed = key_file.names(profile), profile.passed
    for stage in stages:
        path = book.folder / "scripts" / f"{stage.name}{mark and f'-{mark}'}.sbatch"
        write_text(path, array_script(book.folder, identity, stage, held))
        for member in held:
            (member.run.stage(stage.name) / "logs").mkdir(parents=True, exist_ok=True)
        before = tuple((parent, waits[parent]) for parent in stage.parents if parent in waits)
        steps.append(
            transaction.Step(stage.name, identity, path, stage.parents, before, "aftercorr", array, keys, passed)
        )
    made = transaction.submit(book, steps)
    for member, stage in itertools.product(held, stages):
        member.run.record("submitted", stage=stage.name, job=made[stage.name], element=member.index, after=[])
    return [(stage, f"{job}[{array}]") for stage, job in made.items()]


def missing(run: Run, stages: list[Stage], known: dict[str, jobs.Job]) -> tuple[list[Stage], dict[str, jobs.Job]]:
    """Those of ``stages`` that have to be queued, in order, and the live jobs of the others;
    ``known``: all that the queue shows.

    A job whose stage has failed is ending, and jobs that wait for it will be cancelled by Slurm
    within a second: they are cancelled now and replaced, as is one that can never start. One that
    is only held is let go.
    """
    left, gone = {stage.name for stage in manifest.left(run, list(run.stages.values()))}, run.disowned()
    alive = {
        name: job
        for name, job in known.items()
        if job.alive and name in left and job.id not in gone and not _ending(run, name, job)
    }
    todo = {
        stage.name for stage in stages if stage.name in left and (stage.name not in alive or alive[stage.name].stuck)
    }
    for name in list(todo):
        todo |= {
            stage.name
            for stage in descendants(run, run.stages[name])
            if stage.name in alive and alive[stage.name].pending
        }
    replaced = [alive.pop(name).handle for name in todo & set(alive)]
    if replaced:
        sbatch.cancel(replaced)
    held = [job.handle for job in alive.values() if job.reason == "JobHeldUser"]
    if held:  # a controller that crashed may have forgotten that we released it
        sbatch.release(held)
    chain = [stage for stage in run.stages.values() if stage.name in todo]
    lacking = [
        parent
        for stage in chain
        for parent in stage.parents
        if parent in left and parent not in todo and parent not in alive
    ]
    if lacking:
        raise Failed(
            f"{lacking[0]} of {run.folder} is neither done nor queued; queue it and what follows with: "
            f"python -m launcher resume {run.folder}"
        )
    return chain, alive


def _write(run: Run, stage: Stage, text: str) -> Path:
    path = run.stage(stage.name) / f"{stage.name}.sbatch"
    write_text(path, text)
    # Slurm ends a job without a word when it can't open its output
    (run.stage(stage.name) / "logs").mkdir(exist_ok=True)
    return path


def _ending(run: Run, stage: str, job: jobs.Job) -> bool:
    status = run.status(stage)
    return status["state"] in ("failed", "cancelled") and status["job"] == job.id and not job.pending
