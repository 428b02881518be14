"""The loop that the supervised trainers share, and the step boundary that all trainers share. Both
only order things: training/trainer/decision.py says what follows at a step's end."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from training.checkpoint import format
from training.checkpoint.stage_folder import StageFolder
from training.checkpoint.writer import Saver
from training.config.trainers import TrainerConfig
from training.data.batches import Sampler
from training.data.prefetch import Make, prefetched
from training.distributed import groups
from training.distributed.groups import StopRequest, is_main
from training.errors import Interrupted, Unhealthy
from training.metrics import startup_timer, trackers
from training.metrics.metrics import Metrics
from training.metrics.phase_timer import highest, peak_gb
from training.trainer.decision import StepEnd, Stop, decide, evaluates, logs
from training.trainer.early_stopping import EarlyStop
from training.trainer.sample_text import Samples
from training.trainer.step import Learner, Objective


@dataclass(frozen=True)
class SupervisedTask:
    """What a supervised trainer learns, and from what."""

    objective: Objective
    micro_batches: Make
    """Its metrics include "tokens", those of the examples. Runs in a thread of its own, see
    ``prefetched``."""
    heldout: Callable[[], dict[str, float]]
    """Metrics on the held-out rows. A collective."""
    headline: tuple[str, ...]
    """Metrics that the log shows."""
    early_stop: EarlyStop | None = None
    samples: Samples | None = None
    state: Callable[[], dict] = dict
    """What a checkpoint holds in addition to the loop's own state (JSON). A collective."""


def resume(folder: StageFolder, learners: dict[str, Learner]) -> tuple[int, dict]:
    """Restore the latest checkpoint of a stage -> (its iteration, its state); (0, {}) where there
    is none. Raises ConfigError where there are checkpoints and the latest is unknown."""
    iteration = groups.on_first(folder.resume_iteration)
    if iteration is None:
        return 0, {}
    with resident(learners, changed=True):
        state = format.load(folder.resolve(iteration), learners)
    for name, learner in learners.items():
        learner.guard.load_state_dict(state["guards"][name])
    if is_main():
        print(f"resumed from iteration {iteration}", flush=True)
    return iteration, state


@contextlib.contextmanager
def resident(learners: dict[str, Learner], changed: bool):
    """Keep all optimizer states on the device, to be read or (``changed``) written, without
    gradients. Offloaded ones go back at the end."""
    for learner in learners.values():
        learner.ready(changed)
    yield
    for learner in learners.values():
        learner.sleep()


class Boundary:
    """What every trainer does between two steps: evaluate, log, save, and obey signals, at the same
    step on every rank."""

    def __init__(
        self,
        config: TrainerConfig,
        learners: dict[str, Learner],
        folder: StageFolder,
        resumed: tuple[int, dict],
        headline: tuple[str, ...],
        signals: StopRequest,
        early_stop: EarlyStop | None = None,
        samples: Samples | None = None,
    ):
        """``resumed``: what ``resume`` returned."""
        start, state = resumed
        self.config, self.learners, self.folder, self.headline = config, learners, folder, headline
        self.signals, self.early_stop, self.samples = signals, early_stop, samples
        startup_timer.mark("model, data, checkpoint")
        self.began, self.seconds_before = time.monotonic(), state["wall_seconds"] if state else 0.0
        self.metrics = (
            Metrics(config.paths.output, config.iterations, start, trackers.start(config)) if is_main() else None
        )
        self.saver = Saver(folder, learners, config)
        self.is_first = True

    def end(
        self,
        iteration: int,
        values: dict[str, float],
        heldout: Callable[[], dict[str, float]],
        state: Callable[[], dict],
        pause: str = "",
    ) -> bool:
        """End of ``iteration`` (from 1) with its metrics ``values``; ``pause``: why a health gate
        pauses the run. Returns True where the stage is finished.

        Raises Interrupted after a signal and Unhealthy for a pause; the iteration is saved then. A
        collective.
        """
        stop_requested = self.signals.agreed()
        improved = out_of_patience = False
        if evaluates(self.config, iteration):
            values = values | heldout()
            if self.early_stop:
                improved = self.early_stop.update(iteration, groups.from_first(values[self.early_stop.name]))
                out_of_patience = self.early_stop.over
        wall_seconds = self.seconds_before + time.monotonic() - self.began
        self._log(iteration, values | self.saver.poll() | {"wall_seconds": wall_seconds})
        decision = decide(
            self.config,
            StepEnd(iteration, improved, out_of_patience, stop_requested, self.signals.saving, pause),
        )
        if decision.save:
            self._save(iteration, state, wall_seconds)
        if decision.stop:
            self.saver.wait()
        if decision.stop is Stop.PAUSED:
            raise Unhealthy(decision.why)
        if decision.stop is Stop.INTERRUPTED:
            raise Interrupted(decision.why)
        if decision.stop is Stop.FINISHED and is_main():
            self.metrics.close()
            if self.early_stop:
                choose(self.folder, self.early_stop, iteration)
        return decision.stop is Stop.FINISHED

    def _log(self, iteration: int, values: dict[str, float]) -> None:
        """Write the iteration's metrics and, where they are due, sample replies."""
        replies = self.samples.say() if self.samples and self.samples.due(iteration) else []
        if not self.metrics:
            return
        if self.is_first:
            startup_timer.mark("first iteration")
            print(startup_timer.report(), flush=True)
            self.is_first = False
        in_log = logs(self.config, iteration) or evaluates(self.config, iteration)
        self.metrics.log(iteration, self.headline if in_log else (), **values)
        self.metrics.show(iteration, replies)

    def _save(self, iteration: int, state: Callable[[], dict], wall_seconds: float) -> None:
        check_finite(self.learners, iteration)
        saved = {
            **state(),
            "guards": {name: learner.guard.state_dict() for name, learner in self.learners.items()},
            "wall_seconds": wall_seconds,
        }
        best = 0
        if self.early_stop:
            saved["early_stop"], best = self.early_stop.state_dict(), self.early_stop.iteration
        with resident(self.learners, changed=False):
            self.saver.save(iteration, saved, best)
        self.signals.saved()


@contextlib.contextmanager
def at(iteration: int):
    """A step's FloatingPointError, which every rank raises, names its iteration."""
    try:
        yield
    except FloatingPointError as error:
        raise FloatingPointError(f"iteration {iteration}: {error}") from None


def check_finite(learners: dict[str, Learner], iteration: int) -> None:
    """Raise FloatingPointError on every rank where a weight of any is not finite: such a checkpoint
    would replace a good one."""
    bad = torch.tensor(
        [
            float(not all(torch.isfinite(weight).all() for weight in learner.model.parameters()))
            for learner in learners.values()
        ]
    )
    dist.all_reduce(bad, dist.ReduceOp.MAX)
    if names := [name for name, flag in zip(learners, bad.tolist(), strict=True) if flag]:
        raise FloatingPointError(f"iteration {iteration}: weights of {' and '.join(names)} are not finite; not saved")


def train(
    config: TrainerConfig, learner: Learner, sampler: Sampler, task: SupervisedTask, signals: StopRequest
) -> None:
    """Run ``task`` from the latest checkpoint, if any, to ``config.iterations``. Raises Interrupted
    after a signal; the last step is saved then."""
    folder, learners = StageFolder(config.paths.output), {"model": learner}
    start, state = resume(folder, learners)
    if state:
        sampler.load_state_dict(state["sampler"])
        if task.early_stop and "early_stop" in state:  # patience may be configured for the resume only
            task.early_stop.load_state_dict(state["early_stop"])
    if is_finished(config, folder, start, task.early_stop):
        return
    boundary = Boundary(config, learners, folder, (start, state), task.headline, signals, task.early_stop, task.samples)
    with contextlib.closing(prefetched(sampler, task.micro_batches, config.iterations - start)) as batches:
        for iteration in range(start + 1, config.iterations + 1):
            began = time.monotonic()
            ready = next(batches)
            waited = time.monotonic() - began
            with at(iteration):
                values = ready.stats | learner.step(ready.micro_batches, task.objective)
            values |= {"seconds": time.monotonic() - began, "seconds_data": waited}
            values["tokens_per_second"] = ready.stats["tokens"] / values["seconds"]
            if iteration % config.log_every == 0:
                (values["peak_gb"],) = highest([peak_gb()])
            if boundary.end(
                iteration, values, task.heldout, lambda sampled=ready.state: {"sampler": sampled, **task.state()}
            ):
                break


def is_finished(config: TrainerConfig, folder: StageFolder, start: int, early_stop: EarlyStop | None = None) -> bool:
    """Whether the stage, resumed from iteration ``start``, has nothing left to do; the log says so
    then. Else an earlier attempt's choice is withdrawn. A collective."""
    over = start >= config.iterations or bool(early_stop and early_stop.over)
    record = groups.on_first(folder.chosen) if early_stop else None
    is_chosen = record is not None and early_stop.still_holds(record, config.iterations)
    if is_main():
        if over or is_chosen:
            print(f"nothing left to do: iteration {start} of {config.iterations} is saved", flush=True)
            if early_stop and not is_chosen:  # killed before it could choose
                choose(folder, early_stop, start)
        else:
            folder.withdraw_choice()
    return over or is_chosen


def choose(folder: StageFolder, early_stop: EarlyStop, ended: int) -> None:
    """Make the best checkpoint the one that later stages use, and say so. For one rank."""
    folder.choose(early_stop.iteration, early_stop.record(ended))
    print(early_stop.verdict(ended), flush=True)
