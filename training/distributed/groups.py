"""Processes, devices and groups: what a rank is, and how ranks agree.

Ranks read RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT, and nothing else of their
surroundings.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import os
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TypeVar

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel

from training.distributed import rendezvous
from training.distributed.cpu_backend import mcore_on_cpu
from training.errors import CollectiveError

HEARTBEAT = 10.0
T = TypeVar("T")
EX_USAGE, EX_TEMPFAIL = 64, 75
"""Exit codes of a stage: bad configuration, "saved and wants to go on". Others:
training.error_report.CODES."""


def device() -> torch.device:
    """Where this rank computes."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


@contextlib.contextmanager
def ranks(
    tensor_parallel_size: int,
    pipeline_parallel_size: int,
    seed: int,
    init_method: str = "env://",
    virtual_pipeline_size: int = 1,
    timeout_minutes: int = 60,
):
    """Join the process group and build megatron-core's groups (order tp-dp-pp); leave them cleanly
    at the end.

    ``timeout_minutes``: how long a rank waits for the others in a collective, of any group.

    On CUDA collectives of GPU tensors run on NCCL, of CPU tensors on gloo; without CUDA all is gloo
    under ``mcore_on_cpu``. One of several ranks that fails alone leaves its groups standing: NCCL
    destroys a communicator on all of its ranks at once, and the others wait in a collective, so
    that this one would hang before it has said why it failed. Such a process must end
    (training.main).
    """
    with contextlib.ExitStack() as outside, contextlib.ExitStack() as stack:
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
            backend = "cpu:gloo,cuda:nccl"
        else:
            outside.enter_context(mcore_on_cpu())
            backend = "gloo"
        timeout = datetime.timedelta(minutes=timeout_minutes)
        if init_method == "env://":
            rendezvous.join(backend, *rendezvous.place(), timeout)
        else:
            dist.init_process_group(
                backend,
                init_method=init_method,
                timeout=timeout,
                rank=int(os.environ["RANK"]),
                world_size=int(os.environ["WORLD_SIZE"]),
            )
        stack.callback(dist.destroy_process_group)
        interleaved = virtual_pipeline_size if virtual_pipeline_size > 1 else None
        parallel_state.initialize_model_parallel(
            tensor_parallel_size, pipeline_parallel_size, interleaved, distributed_timeout_minutes=timeout_minutes
        )
        stack.callback(parallel_state.destroy_model_parallel)
        tensor_parallel.model_parallel_cuda_manual_seed(seed)
        try:
            yield
        except BaseException as error:
            if dist.get_world_size() > 1 and not isinstance(error, CollectiveError):
                stack.pop_all()
            raise


def begin_thread() -> Callable[[], None]:
    """What a new thread of this rank has to call first: its GPU would be GPU 0, where pinning
    memory would open a context."""
    if not torch.cuda.is_available():
        return lambda: None
    return functools.partial(torch.cuda.set_device, torch.cuda.current_device())


def data_rank() -> int:
    return parallel_state.get_data_parallel_rank()


def data_ranks() -> int:
    return parallel_state.get_data_parallel_world_size()


def last_stage() -> bool:
    return parallel_state.is_pipeline_last_stage()


def is_main() -> bool:
    """True on the one rank that writes logs and metrics."""
    return dist.get_rank() == 0


def sum_over_data(values: torch.Tensor) -> torch.Tensor:
    """Sum of ``values`` over data-parallel ranks, in place."""
    dist.all_reduce(values, group=parallel_state.get_data_parallel_group())
    return values


def from_last_stage(values: torch.Tensor) -> torch.Tensor:
    """Overwrite ``values`` on every pipeline stage with the last stage's, in place."""
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        dist.broadcast(
            values,
            parallel_state.get_pipeline_model_parallel_last_rank(),
            parallel_state.get_pipeline_model_parallel_group(),
        )
    return values


def from_first(value: float) -> float:
    """Rank 0's number on every rank: what is decided by it is decided alike."""
    sent = torch.tensor(value, dtype=torch.double)
    dist.broadcast(sent, 0)
    return sent.item()


def first_problem(problem: str) -> str:
    """Of all ranks' ``problem`` the first that is not "", on every rank."""
    problems = [""] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    return next(filter(None, problems), "")


def on_first(work: Callable[[], T]) -> T:
    """``work()`` on rank 0, its result or its exception on every rank. A collective, however long
    the work takes: the others hear every HEARTBEAT seconds that it goes on, so that nothing times
    out. What is sent is pickled."""
    done, result, error = torch.zeros(1), None, None
    if dist.get_rank() == 0:
        with ThreadPoolExecutor(1) as thread:
            future = thread.submit(work)
            while wait([future], timeout=HEARTBEAT).not_done:
                dist.broadcast(done, 0)
        result, error = (None, future.exception()) if future.exception() else (future.result(), None)
        dist.broadcast(done.fill_(1), 0)
    while not done:
        dist.broadcast(done, 0)
    sent = [result, error]
    dist.broadcast_object_list(sent, 0)
    result, error = sent
    if error is not None:
        raise error
    return result


def ignore_requests() -> None:
    """What asks a rank to save is repeated: it must not kill one that has saved and is leaving,
    whose handlers Python takes down before the process ends."""
    for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


class StopRequest:
    """What signals ask of a trainer: USR1 or TERM to save and stop, USR2 to save and go on.

    One rank that is signalled is enough: ranks agree at step boundaries, so that all save the same
    step.
    """

    def __init__(self):
        self.raised = self.asked = False
        self.saving = False
        """Whether, as of the last ``agreed()``, a save is asked for (on any rank)."""
        for number in (signal.SIGUSR1, signal.SIGTERM):
            signal.signal(number, self._raise)
        signal.signal(signal.SIGUSR2, self._ask)

    def _raise(self, number, frame):
        self.raised = True

    def _ask(self, number, frame):
        self.asked = True

    def agreed(self) -> bool:
        """True on all ranks as soon as one was told to stop. A collective: call it on every rank at
        the same step."""
        flags = torch.tensor([float(self.raised), float(self.asked)])
        dist.all_reduce(flags, dist.ReduceOp.MAX)
        stopping, self.saving = (bool(flag) for flag in flags.tolist())
        return stopping

    def saved(self) -> None:
        """What was asked for is done; the request may have been repeated meanwhile."""
        self.asked = self.saving = False
