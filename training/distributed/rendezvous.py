"""How ranks find each other: RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, which the launcher or
torchrun sets.

They may also be left over in a shell, where no one else comes. So what is impossible is refused,
and the wait for the others has an end. eval/rendezvous.py does the same for the evaluation, which
imports nothing of ours.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import signal
import sys
from collections.abc import Iterator

import torch.distributed as dist

from training.errors import ConfigError

LIMITS_S = {"CONVOY_ATTEMPT": 1800, "TORCHELASTIC_RUN_ID": 600, "": 60}
"""Seconds to wait for the other ranks: started by the launcher, by torchrun, by whom we don't
know."""
LEFT_OVER = "a single process is started without them: env -u RANK -u WORLD_SIZE -u LOCAL_RANK python -m ..."


def place() -> tuple[int, int]:
    """(rank, number of ranks); alone where WORLD_SIZE is 1 or unset. ConfigError for what can't
    be."""
    environ = os.environ
    if environ.get("WORLD_SIZE", "1").strip() in ("", "1"):
        return 0, 1
    try:
        rank, world = int(environ["RANK"]), int(environ["WORLD_SIZE"])
        port = int(environ["MASTER_PORT"])
    except (KeyError, ValueError):
        rank, world, port = -1, 0, 0
    if not 0 <= rank < world or not 0 < port < 65536 or not environ.get("MASTER_ADDR"):
        names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        variables = ", ".join(f"{name}={environ[name]!r}" if name in environ else f"no {name}" for name in names)
        raise ConfigError(
            f"environment: {variables}; expected 0 <= RANK < WORLD_SIZE, an address and a port. {LEFT_OVER}"
        )
    return rank, world


def join(backend: str, rank: int, world: int, timeout: datetime.timedelta) -> None:
    """The process group of all ranks. ConfigError where the others don't come in time, unless the
    launcher started this one: then torch's own error, by which the launcher knows the class.
    ``timeout`` is that of collectives."""
    if world == 1:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
        return
    mark = next(name for name in LIMITS_S if not name or name in os.environ)
    limit, where = LIMITS_S[mark], f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    if not mark:
        print(
            f"rank {rank} of {world}, as RANK and WORLD_SIZE in the environment say: waits at most {limit} s for the "
            f"others at {where}; {LEFT_OVER}",
            file=sys.stderr,
            flush=True,
        )
    try:
        with _interruptible():
            store, _, _ = next(dist.rendezvous("env://", timeout=datetime.timedelta(seconds=limit)))
    except (dist.DistError, OSError, ValueError) as error:
        if mark == "CONVOY_ATTEMPT":
            raise
        raise ConfigError(
            f"rank {rank} of {world}: the others did not come to {where} within {limit} s ({error}); "
            f"start all {world}, by torchrun for example; {LEFT_OVER}"
        ) from None
    store.set_timeout(timeout)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """TERM and Ctrl-C end the process: the wait is in C++, where no handler of Python's runs."""
    try:
        before = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGTERM, signal.SIGINT)}
    except ValueError:  # not the main thread
        before = {}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
