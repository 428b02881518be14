"""What follows at the end of a step: evaluate, log, save, stop. Pure functions of numbers that are
the same on every rank, so all ranks decide alike."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from training.config.trainer_config import TrainerConfig


class Stop(Enum):
    """Why a trainer makes no further step."""

    FINISHED = "finished"
    """All iterations were run, or early stopping ended the stage."""
    PAUSED = "paused"
    """A health gate asks a person to look."""
    INTERRUPTED = "interrupted"
    """A signal asked to save and stop."""


@dataclass(frozen=True)
class StepEnd:
    """What is known at the end of a step, the same on every rank."""

    iteration: int
    """From 1."""
    improved: bool = False
    """Early stopping saw the best evaluation so far at this step."""
    out_of_patience: bool = False
    """Early stopping saw too many evaluations without an improvement."""
    stop_requested: bool = False
    """A signal asked to save and stop."""
    save_requested: bool = False
    """A signal asked to save and go on."""
    pause: str = ""
    """Why a health gate pauses the run."""


@dataclass(frozen=True)
class Decision:
    """What a trainer does at the end of a step, after the evaluation."""

    save: bool
    stop: Stop | None
    """None: the next step follows."""
    why: str
    """Of a stop, for the log and the error; "" without one."""


def logs(config: TrainerConfig, iteration: int) -> bool:
    """Whether the numbers of ``iteration`` go to the log: all of them go to metrics.jsonl."""
    return _is_due(config, iteration, config.log_every)


def evaluates(config: TrainerConfig, iteration: int) -> bool:
    """Whether ``iteration`` ends with an evaluation on the held-out rows."""
    return _is_due(config, iteration, config.eval_every)


def decide(config: TrainerConfig, end: StepEnd) -> Decision:
    """What follows after the evaluation of a step, if there was one.

    Every stop saves. A finished stage is neither paused nor interrupted. A pause comes before a
    signal: the launcher queues an interrupted stage again, and a paused one waits for a person.
    """
    stop, why = _stop(config, end)
    regular = _is_due(config, end.iteration, config.save_every)
    return Decision(regular or end.improved or end.save_requested or stop is not None, stop, why)


def _stop(config: TrainerConfig, end: StepEnd) -> tuple[Stop | None, str]:
    if end.iteration == config.iterations:
        return Stop.FINISHED, "the last iteration"
    if end.out_of_patience:
        return Stop.FINISHED, "no improvement"
    saved = f"iteration {end.iteration} is saved"
    if end.pause:
        return Stop.PAUSED, f"paused by a health gate: {end.pause}; {saved}, and resume goes on from it"
    if end.stop_requested:
        return Stop.INTERRUPTED, f"stopped by a signal; {saved}"
    return None, ""


def _is_due(config: TrainerConfig, iteration: int, every: int) -> bool:
    return iteration == config.iterations or iteration % every == 0
