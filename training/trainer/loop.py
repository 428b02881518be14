"""The loop that SFT and reward model share, and the step boundary that all trainers share: they
only order things."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from training.checkpoint import format
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
from training.trainer.early_stopping import EarlyStop, choose, chosen, forget
from training.trainer.sample_text import Samples
from training.trainer.step import Learner, Objective


@dataclass(frozen=True)
class Task:
    """What a supervised trainer learns, and from what."""

    objective: Objective
    micro_batches: Make
    """The numbers are among them "tokens", those of the examples. Runs in a thread of its own, see
    ``prefetched``."""
    heldout: Callable[[], dict[str, float]]
    """Numbers on the held-out rows. A collective."""
    headline: tuple[str, ...]
    """Numbers that the log shows."""
    early: EarlyStop | None = None
    samples: Samples | None = None
    state: Callable[[], dict] = dict
    """What a checkpoint holds beside the loop's own (JSON). A collective."""


def resume(stage: str, learners: dict[str, Learner]) -> tuple[int, dict]:
    """Restore the last checkpoint of ``stage`` -> (its iteration, its state); (0, {}) where there
    is none. Raises ConfigError where it can't be known which is the last."""
    iteration = groups.on_first(lambda: format.begin_from(stage))
    if iteration is None:
        return 0, {}
    with awake(learners, changed=True):
        state = format.load(format.resolve(stage, iteration), learners)
    for name, learner in learners.items():
        learner.guard.load_state_dict(state["guards"][name])
    if is_main():
        print(f"resumed from iteration {iteration}", flush=True)
    return iteration, state


@contextlib.contextmanager
def awake(learners: dict[str, Learner], changed: bool):
    """All optimizer states on the device, to be read or (``changed``) written, without gradients;
    those that were offloaded go back."""
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
        resumed: tuple[int, dict],
        headline: tuple[str, ...],
        stop: StopRequest,
        early: EarlyStop | None = None,
        samples: Samples | None = None,
    ):
        """``resumed``: what ``resume`` gave."""
        start, state = resumed
        self.config, self.learners, self.headline, self.stop, self.early, self.samples = (
            config,
            learners,
            headline,
            stop,
            early,
            samples,
        )
        startup_timer.mark("model, data, checkpoint")
        self.began, self.used = time.monotonic(), state["wall_seconds"] if state else 0.0
        self.metrics = (
            Metrics(config.paths.output, config.iterations, start, trackers.start(config)) if is_main() else None
        )
        self.saver = Saver(config.paths.output, learners, config)
        self.first = True

    def end(
        self,
        iteration: int,
        values: dict[str, float],
        heldout: Callable[[], dict[str, float]],
        state: Callable[[], dict],
        pause: str = "",
    ) -> None:
        """End of ``iteration`` (from 1), which gave ``values``; ``pause``: why the run may not go
        on. Raises Interrupted when told to stop, Unhealthy for a pause, all saved. A collective."""
        config, last, stopping = self.config, iteration == self.config.iterations, self.stop.agreed()
        due = {
            name: last or iteration % every == 0
            for name, every in (("log", config.log_every), ("eval", config.eval_every), ("save", config.save_every))
        }
        if due["eval"]:
            values = values | heldout()
            if self.early:
                due["save"] |= self.early.see(iteration, groups.from_first(values[self.early.name]))
                last |= self.early.over
                due["save"] |= last
        wall = self.used + time.monotonic() - self.began
        values = values | self.saver.poll() | {"wall_seconds": wall}
        said = self.samples.say() if self.samples and self.samples.due(iteration) else []
        if self.metrics:
            if self.first:
                startup_timer.mark("first iteration")
                print(startup_timer.words(), flush=True)
                self.first = False
            self.metrics.log(iteration, self.headline if due["log"] or due["eval"] else (), **values)
            self.metrics.show(iteration, said)
        if due["save"] or stopping or pause or self.stop.saving:
            check_finite(self.learners, iteration)
            guards = {name: learner.guard.state_dict() for name, learner in self.learners.items()}
            held, best = ({"early_stop": self.early.state_dict()}, self.early.iteration) if self.early else ({}, 0)
            with awake(self.learners, changed=False):
                self.saver.save(iteration, {**state(), "guards": guards, "wall_seconds": wall, **held}, best)
            self.stop.saved()
        if stopping or pause or last:
            self.saver.wait()
        if last and self.metrics:
            self.metrics.close()
        if pause and not last:  # before the signal's: that would be queued again
            raise Unhealthy(
                f"paused by a health gate: {pause}; iteration {iteration} is saved, and resume goes on from it"
            )
        if stopping and not last:
            raise Interrupted(f"stopped by a signal; iteration {iteration} is saved")


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


def train(config: TrainerConfig, learner: Learner, sampler: Sampler, task: Task, stop: StopRequest) -> None:
    """Run ``task`` from the last checkpoint, if any, to ``config.iterations``. Raises Interrupted
    after a signal, all saved."""
    start, state = resume(config.paths.output, {"model": learner})
    if state:
        sampler.load_state_dict(state["sampler"])
        if task.early and "early_stop" in state:  # patience may be asked for later
            task.early.load_state_dict(state["early_stop"])
    if ended(config, task.early, start):
        return
    boundary = Boundary(config, {"model": learner}, (start, state), task.headline, stop, task.early, task.samples)
    with contextlib.closing(prefetched(sampler, task.micro_batches, config.iterations - start)) as batches:
        for iteration in range(start + 1, config.iterations + 1):
            began = time.monotonic()
            ready = next(batches)
            waited = time.monotonic() - began
            with at(iteration):
                values = ready.said | learner.step(ready.micro_batches, task.objective)
            values |= {"seconds": time.monotonic() - began, "seconds_data": waited}
            values["tokens_per_second"] = ready.said["tokens"] / values["seconds"]
            if iteration % config.log_every == 0:
                (values["peak_gb"],) = highest([peak_gb()])
            boundary.end(
                iteration, values, task.heldout, lambda sampled=ready.state: {"sampler": sampled, **task.state()}
            )
            if task.early and task.early.over:
                break
    if task.early and is_main():
        print(choose(config.paths.output, task.early, iteration), flush=True)


def ended(config: TrainerConfig, early: EarlyStop | None, start: int) -> bool:
    """Whether nothing is left to do, which is said; else what an earlier attempt chose is
    forgotten."""
    stage, over = config.paths.output, start >= config.iterations or bool(early and early.over)
    said = chosen(stage, early, config.iterations) if early else None
    if is_main():
        if over or said:
            print(f"nothing left to do: iteration {start} of {config.iterations} is saved", flush=True)
            if early and not said:  # killed before it could choose
                print(choose(stage, early, start), flush=True)
        else:
            forget(stage)
    return over or said is not None
