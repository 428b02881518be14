"""Queue what is left of a run, or of a sweep's runs: which stages need a job, and the jobs.

A single run is a batch of one. The runs of a sweep that have the same stages left become one job
array a stage.
"""

from __future__ import annotations

import itertools
from pathlib import Path

from launcher.config import key_file
from launcher.config.sections import build_plain
from launcher.config.stages import Stage
from launcher.run import manifest
from launcher.run.folder import Failed, Run, sweep_of, write_text
from launcher.slurm import queue as job_queue
from launcher.slurm import script, transaction
from launcher.slurm.queue import Job
from launcher.submit.job_array import array_script, index_of, is_element
from launcher.submit.rewind import descendants, move_stale_aside


def queue(runs: list[Run], stages: list[Stage]) -> list[tuple[str, str]]:
    """Queue what is neither done nor queued already, all or none, of one run or of some runs of one
    sweep.

    Returns (stage, job) of each new job, e.g. ("sft", "12") or for an array ("sft", "12[0,3]"). Two
    commands at once queue it once: the second waits for the first. What an earlier one left half
    queued is settled before.
    """
    owner = Run(runs[0].folder.parent) if is_element(runs[0]) else runs[0]
    with transaction.patient(owner.lock):
        transaction.settle(owner)
        jobs = job_queue.of_runs(runs)
        batches: dict[tuple, list[Run]] = {}
        for run in runs:
            missing, alive = missing_stages(run, stages, jobs[run.id])
            move_stale_aside(run, missing)
            parents = {parent for stage in missing for parent in stage.parents if parent in alive}
            waits = tuple((parent, _number(alive[parent])) for parent in sorted(parents))
            batches.setdefault((tuple(stage.name for stage in missing), waits), []).append(run)
        queued = []
        for number, ((names, waits), batch) in enumerate(batches.items()):
            suffix = f"-{number}" if len(batches) > 1 else ""
            queued += _queue_batch(owner, batch, names, dict(waits), suffix) if names else []
        return queued


def _queue_batch(
    owner: Run, batch: list[Run], names: tuple[str, ...], waits: dict[str, int], suffix: str
) -> list[tuple[str, str]]:
    """One job a stage for a single run, one array a stage for a sweep's runs. ``owner`` keeps the
    ledger; ``waits``: parent that is queued already -> its job."""
    profile, is_sweep = batch[0].profile, is_element(batch[0])
    array = ",".join(str(index_of(run)) for run in batch) if is_sweep else ""
    steps = [
        transaction.Step(
            stage.name,
            sweep_of(owner.folder)["id"] if is_sweep else owner.id,
            _write_script(owner, batch, stage, suffix),
            stage.parents,
            tuple((parent, waits[parent]) for parent in stage.parents if parent in waits),
            "aftercorr" if is_sweep else "afterok",
            array,
            without=key_file.names(profile),
            passed=profile.passed,
        )
        for stage in (batch[0].stages[name] for name in names)
    ]
    jobs = transaction.submit(owner, steps)
    for run, name in itertools.product(batch if is_sweep else [], names):
        run.record("submitted", stage=name, job=jobs[name], element=index_of(run), after=[])
    return [(stage, f"{job}[{array}]" if array else str(job)) for stage, job in jobs.items()]


def _write_script(owner: Run, batch: list[Run], stage: Stage, suffix: str) -> Path:
    if is_element(batch[0]):
        path = owner.folder / "scripts" / f"{stage.name}{suffix}.sbatch"
        sweep = sweep_of(owner.folder)
        text = array_script(owner.folder, sweep["id"], stage, batch, sweep["values"])
    else:
        resources = getattr(build_plain("resources", owner.config["resources"]), stage.name)
        path = owner.stage(stage.name) / f"{stage.name}.sbatch"
        text = script.script(script.stage_request(owner, stage, resources, owner.profile))
    write_text(path, text)
    for run in batch:  # Slurm ends a job without a word when it can't open its output
        (run.stage(stage.name) / "logs").mkdir(parents=True, exist_ok=True)
    return path


def missing_stages(run: Run, stages: list[Stage], jobs: dict[str, Job]) -> tuple[list[Stage], dict[str, Job]]:
    """Those of ``stages`` that need a job, in order, and the live jobs of the others; ``jobs``: all
    that the queue shows of the run.

    A job whose stage has failed is ending, and Slurm cancels the jobs that wait for it within a
    second: they are cancelled now and replaced, as is one that can never start. A job that is only
    held is released.
    """
    unfinished = {stage.name for stage in manifest.left(run, list(run.stages.values()))}
    disowned = run.disowned()
    alive = {
        name: job
        for name, job in jobs.items()
        if job.alive and name in unfinished and job.id not in disowned and not _ending(run, name, job)
    }
    missing = {
        stage.name
        for stage in stages
        if stage.name in unfinished and (stage.name not in alive or alive[stage.name].stuck)
    }
    for name in list(missing):
        later = {stage.name for stage in descendants(run, run.stages[name])}
        missing |= {name for name in later if name in alive and alive[name].pending}
    replaced = [alive.pop(name).handle for name in missing & set(alive)]
    if replaced:
        script.cancel(replaced)
    held_jobs = [job.handle for job in alive.values() if job.reason == "JobHeldUser"]
    if held_jobs:  # a controller that crashed may have forgotten that we released them
        script.release(held_jobs)
    chain = [stage for stage in run.stages.values() if stage.name in missing]
    parents = [parent for stage in chain for parent in stage.parents if parent in unfinished]
    lacking = [parent for parent in parents if parent not in missing and parent not in alive]
    if lacking:
        raise Failed(
            f"{lacking[0]} of {run.folder} is neither done nor queued; queue it and what follows with: "
            f"python -m launcher resume {run.folder}"
        )
    return chain, alive


def _number(job: Job) -> int:
    """The number by which another job waits for it; that of its array for an element."""
    return int(job.element.partition("_")[0]) if job.element else job.id


def _ending(run: Run, stage: str, job: Job) -> bool:
    status = run.status(stage)
    return status["state"] in ("failed", "cancelled") and status["job"] == job.id and not job.pending
