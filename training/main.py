"""The outermost function of every stage: one argument in, one exit code out."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from training.config import ConfigError
from training.data.formats import DataError
from training.parallel import EX_DATA, EX_TEMPFAIL, EX_USAGE


class Interrupted(RuntimeError):  # noqa: N818 - not an error: the checkpoint is complete
    """A signal asked the stage to stop; everything is saved."""


def run_stage(stage: Callable[[str], None]) -> int:
    """Run ``stage(config path)``: 0 done, 64 bad configuration, 65 bad data, 75 saved and wants to go on; other errors propagate."""
    if len(sys.argv) != 2:
        print(f"usage: python -m MODULE config.json; got {len(sys.argv) - 1} arguments", file=sys.stderr)
        return EX_USAGE
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "29400")):
        os.environ.setdefault(name, value)
    try:
        stage(sys.argv[1])
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return EX_USAGE
    except DataError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return EX_DATA
    except Interrupted as stopped:
        print(stopped, flush=True)
        return EX_TEMPFAIL
    return 0
