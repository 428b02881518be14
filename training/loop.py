"""The loop that SFT and reward model share: it only orders things."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from training import checkpoint
from training.config import TrainerConfig
from training.data.batches import Sampler
from training.main import Interrupted
from training.metrics import Metrics
from training.parallel import StopRequest, is_main
from training.step import Batch, Learner, Objective


@dataclass(frozen=True)
class Task:
    """What a supervised trainer learns, and from what."""

    objective: Objective
    micro_batches: Callable[[list[int]], list[Batch]]
    """Row indices of a global batch -> this data-parallel rank's micro-batches."""
    heldout: Callable[[], dict[str, float]]
    """Numbers on the held-out rows. A collective."""
    headline: tuple[str, ...]
    """Numbers that the log shows."""


def resume(stage: str, learners: dict[str, Learner]) -> tuple[int, dict]:
    """Restore the last checkpoint of ``stage`` -> (its iteration, its state); (0, {}) where there is none."""
    iteration = checkpoint.latest(stage)
    if iteration is None:
        return 0, {}
    state = checkpoint.load(checkpoint.resolve(stage, iteration), learners)
    if is_main():
        print(f"resumed from iteration {iteration}", flush=True)
    return iteration, state


def train(config: TrainerConfig, learner: Learner, sampler: Sampler, task: Task, stop: StopRequest) -> None:
    """Run ``task`` from the last checkpoint, if any, to ``config.iterations``. Raises Interrupted after a signal, all saved."""
    stage = config.paths.output
    start, state = resume(stage, {"model": learner})
    if state:
        sampler.load_state_dict(state["sampler"])
    if start >= config.iterations:
        print(f"nothing left to do: iteration {start} of {config.iterations} is saved", flush=True)
        return
    metrics = Metrics(stage, config.iterations, start) if is_main() else None
    for iteration in range(start + 1, config.iterations + 1):
        began = time.monotonic()
        batches = task.micro_batches(sampler.next_batch())
        values = learner.step(batches, task.objective)
        values["seconds"] = time.monotonic() - began
        last, stopping = iteration == config.iterations, stop.agreed()
        due = {name: last or iteration % every == 0
               for name, every in (("log", config.log_every), ("eval", config.eval_every), ("save", config.save_every))}
        if due["eval"]:
            values |= task.heldout()
        if metrics:
            metrics.log(iteration, task.headline if due["log"] or due["eval"] else (), **values)
        if due["save"] or stopping:
            checkpoint.save(stage, iteration, {"model": learner}, {"sampler": sampler.state_dict()}, config)
        if stopping and not last:
            raise Interrupted(f"stopped by a signal; iteration {iteration} is saved")
    if metrics:
        metrics.close()
