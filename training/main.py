"""The outermost function of every stage: one argument in, one exit code out."""

from __future__ import annotations

import faulthandler
import os
import sys
import traceback
from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

from training import error_report
from training.checkpoint.writer import SaveFailed
from training.config.schema import load, usage
from training.config.trainers import TrainerConfig
from training.distributed.groups import EX_TEMPFAIL, ignore_requests, ranks
from training.errors import ConfigError, Damaged, DataError, Interrupted, NoRoom, Unhealthy
from training.metrics import startup_timer, trackers

Config = TypeVar("Config")


def run_stage(kind: type[Config], stage: Callable[[Config], None]) -> int:
    """Run ``stage(config)`` inside its ranks, with the configuration of class ``kind`` that the one
    argument names.

    Trainers run at their own layout, other stages on one rank. Returns the exit code: 0 done, 64
    bad configuration, 65 bad data or checkpoint, 73 a file can't be read or written, 74 full disk,
    75 wants to go on from what is saved, 76 paused or stopped by a health gate, 1 any other error.
    An error leaves its class in training.error_report.
    """
    program = sys.modules["__main__"]
    ended = usage(sys.argv[1:], getattr(program.__spec__, "name", "MODULE"), "config.json", program.__doc__)
    if ended is not None:
        return ended
    startup_timer.mark("imports")
    # a hung rank that gets an ABRT, and one that crashes in C, says where it is
    faulthandler.enable()
    error_report.versions()
    try:
        config = load(kind, sys.argv[1])
        if isinstance(config, TrainerConfig):
            trackers.check(config)
            layout = ranks(
                config.tensor_parallel,
                config.pipeline_parallel,
                config.seed,
                virtual_pipeline_size=config.virtual_pipeline,
                timeout_minutes=config.collective_minutes,
            )
        else:
            layout = ranks(1, 1, 0)
        with layout:
            startup_timer.mark("process groups")
            stage(config)
    except (ConfigError, Damaged, DataError) as error:
        return _ended(error_report.printed(error))
    except SaveFailed as error:
        return error_report.printed(error, error.kind)
    except Unhealthy as error:
        return error_report.printed(error, "health gate")
    except NoRoom as error:
        error_report.printed(error, "")
        return EX_TEMPFAIL
    except Interrupted as stopped:
        ignore_requests()
        print(stopped, flush=True)
        return EX_TEMPFAIL
    except Exception as error:
        traceback.print_exc()
        return _ended(error_report.of(error))
    except BaseException:
        if dist.is_initialized():
            traceback.print_exc()
            _ended(1)
        raise
    return 0


def _ended(code: int) -> int:
    """``code``; but a rank that failed alone ends at once: Python's own end would wait for NCCL's
    threads, and they for the other ranks."""
    if dist.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code
