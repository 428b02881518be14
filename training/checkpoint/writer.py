"""Writing checkpoints, while training waits or while it goes on.

A save has three parts: plan (what each rank owns), write (each rank its own files, no
communication), publish (at a step boundary: every rank has written, rank 0 adds descriptions and
checksums, renames the folder, moves ``latest``). With ``async_save`` the loop waits for the plan
and a copy of the tensors in host memory; threads write; a later boundary publishes.

Threads, and not megatron-core's forked writers: a fork of a process with CUDA, NCCL and gloo
threads copies their locks in any state; a killed rank's forks live on and write into a folder that
the next attempt uses; and one that dies (out of memory) leaves its parent waiting without end.
Writing and hashing release Python's lock, so threads cost the loop little.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import time
from collections import ChainMap
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import is_main_replica
from torch.distributed.checkpoint.filesystem import SerializationFormat, _StorageWriterTransforms, _write_item
from torch.distributed.checkpoint.planner import WriteItem
from torch.distributed.checkpoint.storage import WriteResult

from training import error_report
from training.checkpoint import format, strategies
from training.checkpoint.stage_folder import StageFolder
from training.config.trainers import TrainerConfig
from training.distributed import groups
from training.errors import CollectiveError


class SaveFailed(CollectiveError):
    """A checkpoint could not be written; earlier ones are complete. The message names rank, file,
    cause and fix; ``kind`` is the class of the error (training.error_report)."""

    def __init__(self, message: str, kind: str):
        super().__init__(message)
        self.kind = kind


@dataclass
class _Save:
    """One save under way on this rank."""

    iteration: int
    state: dict
    temporary: Path
    """Folder that is written until it is published."""
    started: float
    best: int
    """Iteration that stays when old checkpoints are deleted."""
    plans: list[tuple[strategies.PlannedWriter, list[Callable]]] = field(default_factory=list)
    """For each learner its files, and what to call when all ranks have written them."""
    written: Future | None = None
    error: str = ""
    kind: str = ""
    """The error's class (training.error_report)."""


class Saver:
    """Saves one stage's learners. Every method is a collective: call it on all ranks at the same
    step."""

    def __init__(self, folder: StageFolder, learners: dict[str, format.Trained], trainer: TrainerConfig):
        self.folder, self.learners, self.trainer = folder, learners, trainer
        self.pool = ThreadPoolExecutor(1, "save", groups.begin_thread())
        self.staging = _Staging()
        self.allocating: Future | None = None
        self.current: _Save | None = None
        self.cleaning: Future | None = None
        self.is_validated = False
        self.times: dict[str, float] = {}

    def save(self, iteration: int, state: dict, best: int = 0) -> None:
        """Write one checkpoint of all learners and ``state`` (JSON). Returns when it is published
        or, with async_save, when the tensors are copied. The checkpoint of ``best`` is not deleted.

        Raises SaveFailed on every rank where one rank can't write; nothing is left of the failed
        save then.
        """
        self.wait()
        began = time.monotonic()
        saved = {
            "iteration": iteration,
            "made_with": format.fixed_settings(self.trainer, next(iter(self.learners.values())).model),
            "optimizer_steps": {name: learner.schedule.num_steps for name, learner in self.learners.items()},
        }
        current = _Save(iteration, {**saved, **state}, self.folder.temporary(iteration, "saving"), began, best)
        states = {name: format.sharded(learner, is_loading=False) for name, learner in self.learners.items()}
        self._prepare(current, states)
        current.plans = [
            strategies.plan(tensors, current.temporary / name, validate=not self.is_validated)
            for name, tensors in states.items()
        ]
        self.is_validated = True
        if self.allocating:
            self.allocating.result()
        staging = self.staging if self.trainer.async_save else None
        current.written = self.pool.submit(_write, [_freeze(plan.files, staging) for plan, _ in current.plans])
        if staging:
            staging.drop_unused()
        self.current = current
        self._add_stall(time.monotonic() - began)
        if not self.trainer.async_save:
            self.wait()

    def poll(self) -> dict[str, float]:
        """Publish a save that all ranks have written -> seconds of a save finished since the last
        call (metrics), once.

        ``save_s``: from its start until it is published; ``save_stall_s``: of these, seconds that
        training stood still.
        """
        if self.trainer.async_save and torch.cuda.is_available() and not self.allocating:
            # While training goes on, and after its first step, which allocates the optimizer's
            # state: pinning takes 0.6 s a GB.
            states = [format.sharded(learner, is_loading=False) for learner in self.learners.values()]
            tensors = [tensor.data for tensor in _owned(states)]
            self.allocating = ThreadPoolExecutor(1, "pin", groups.begin_thread()).submit(self.staging.prepare, tensors)
        if self.current:
            waiting = torch.tensor(float(not self.current.written.done()))
            dist.all_reduce(waiting, dist.ReduceOp.MAX)
            if not waiting.item():
                self._finish()
        if "save_s" not in self.times:
            return {}
        times, self.times = self.times, {}
        return times

    def wait(self) -> None:
        """Publish the save under way, if there is one. Returns when it is published and old
        checkpoints are deleted."""
        if self.current:
            self._finish()
        if self.cleaning:
            self.cleaning.result()
            self.cleaning = None

    def _finish(self) -> None:
        began, current, self.current = time.monotonic(), self.current, None
        results, digests = self._attempt(current, current.written.result) or ([], {})
        self._agree(current)
        for (plan, finalize), written in zip(current.plans, results, strict=True):
            plan.results = written
            for function in finalize:
                function()
        by_rank = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
        dist.gather_object(digests, by_rank)
        if by_rank:
            self._attempt(current, self._publish, current, dict(ChainMap(*by_rank)))
        self._agree(current)
        ended = time.monotonic()
        self.times["save_s"] = ended - current.started
        self._add_stall(ended - began)

    def _add_stall(self, seconds: float) -> None:
        self.times["save_stall_s"] = self.times.get("save_stall_s", 0.0) + seconds

    def _prepare(self, current: _Save, states: dict[str, dict]) -> None:
        """Make the folders. Fails before anything is written where the file system lacks room."""
        needed_bytes = sum(tensor.data.nbytes for tensor in _owned(list(states.values())))
        needed = torch.tensor(float(needed_bytes), dtype=torch.double)
        dist.all_reduce(needed)
        if dist.get_rank() == 0:
            self._attempt(current, self._make_folders, current.temporary, needed.item())
        self._agree(current)

    def _make_folders(self, temporary: Path, needed: float) -> None:
        self.folder.clear()
        for name in self.learners:
            (temporary / name).mkdir(parents=True)
        free = shutil.disk_usage(self.folder.path).free
        if needed > free:
            raise OSError(errno.ENOSPC, f"No space left on device: it needs {needed / 1e9:,.3f} GB")

    def _publish(self, current: _Save, digests: dict[str, str]) -> None:
        (current.temporary / "state.json").write_text(json.dumps(current.state, indent=1), encoding="utf-8")
        self.folder.publish(current.temporary, current.iteration, digests)
        self.cleaning = self.pool.submit(self.folder.prune, current.iteration, self.trainer, current.best)

    def _attempt(self, current: _Save, function, *args):
        """Call ``function(*args)``. An error is stored for ``_agree``, which raises it on all
        ranks: no rank then waits for one that has left."""
        try:
            return function(*args)
        except (OSError, RuntimeError) as error:
            current.error, current.kind = str(error), error_report.kind_of(error)
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                stage = self.folder.path
                current.error += f" ({shutil.disk_usage(stage).free / 1e9:,.3f} GB are free in {stage})"
        return None

    def _agree(self, current: _Save) -> None:
        """Raise SaveFailed on all ranks where ``current.error`` is set on any, with the cause of
        the first of them."""
        errors = [None] * dist.get_world_size()
        dist.all_gather_object(errors, (current.error, current.kind))
        failed = [(rank, error, kind) for rank, (error, kind) in enumerate(errors) if error]
        if not failed:
            return
        # the threads of all ranks have ended: none writes there now
        if dist.get_rank() == 0:
            shutil.rmtree(current.temporary, ignore_errors=True)
        last = self.folder.latest()
        fallback = (
            "nothing is saved yet" if last is None else f"iteration {last} is complete, and resume starts from it"
        )
        rank, cause, kind = failed[0]
        raise SaveFailed(
            f"saving iteration {current.iteration} failed on rank {rank}: "
            f"{cause}; {fallback}; make room or repair the file system, then resume",
            kind,
        )


def _owned(states: list[dict]) -> list[ShardedTensor]:
    """The tensors that this rank writes: other ranks may hold replicas."""
    sharded = (tensor for tensor in nested_values(states) if isinstance(tensor, ShardedTensor))
    return [tensor for tensor in sharded if is_main_replica(tensor.replica_id)]


class _Staging:
    """Host memory for the tensors of asynchronous saves, reused from save to save. It is pinned
    where the tensors come from a GPU.

    It is allocated in the right size and pinned by cudaHostRegister, because torch's own allocator
    of pinned memory rounds up to a power of two.
    """

    def __init__(self):
        self.buffers: dict[tuple[int, int], torch.Tensor] = {}
        """By address and bytes of the tensor that is copied there: a weight and a part of it may
        begin at one address."""
        self.used: set[tuple[int, int]] = set()
        """Keys of the buffers that the current save uses."""

    def prepare(self, tensors: list[torch.Tensor]) -> None:
        for tensor in tensors:
            self._buffer(tensor)

    def copy(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy of ``tensor`` in host memory, complete once the device is synchronized."""
        target = self._buffer(tensor).view(tensor.dtype).view(tensor.shape)
        return target.copy_(tensor.detach(), non_blocking=True)

    def _buffer(self, tensor: torch.Tensor) -> torch.Tensor:
        key = tensor.data_ptr(), tensor.nbytes
        self.used.add(key)
        buffer = self.buffers.get(key)
        if buffer is None:
            # zeros touch the pages: those that exist are pinned quickly
            buffer = torch.zeros(tensor.nbytes, dtype=torch.uint8)
            if tensor.is_cuda and tensor.nbytes:
                torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(buffer.data_ptr(), buffer.nbytes, 0))
            self.buffers[key] = buffer
        return buffer

    def drop_unused(self) -> None:
        """Free the buffers that no tensor used since the last call: theirs has moved, or no longer
        exists."""
        for key in self.buffers.keys() - self.used:
            _unpin(self.buffers.pop(key))
        self.used.clear()

    def __del__(self):
        for buffer in self.buffers.values():
            _unpin(buffer)


def _unpin(memory: torch.Tensor) -> None:
    """Unregister ``memory``; else a later tensor at this address can't be pinned."""
    if torch.cuda.is_available() and memory.is_pinned():
        torch.cuda.cudart().cudaHostUnregister(memory.data_ptr())


Files = list[tuple[Path, list[tuple[WriteItem, torch.Tensor]]]]
"""(path, [(item, tensor)]) of each file."""


def _freeze(files: Files, staging: _Staging | None) -> Files:
    """The files with their tensors copied to ``staging``, so that training may change the
    originals. Without staging, the files as they are."""
    if not staging:
        return files
    copies = [(path, [(item, staging.copy(tensor)) for item, tensor in items]) for path, items in files]
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return copies


def _write(models: list[Files]) -> tuple[list[list[list[WriteResult]]], dict[str, str]]:
    """Write all files -> torch's write results by model and file, and every file's sha256 by
    "model/file"."""
    digests: dict[str, str] = {}
    with ThreadPoolExecutor(strategies.WRITERS, "write", groups.begin_thread()) as pool:
        pending = [[pool.submit(_write_file, path, items) for path, items in files] for files in models]
        written = [[file.result() for file in files] for files in pending]
    for files in written:
        digests |= {name: digest for _, name, digest in files}
    return [[results for results, _, _ in files] for files in written], digests


def _write_file(path: Path, items: list) -> tuple[list, str, str]:
    """One ``.distcp`` file, on disk when this returns -> torch's write results, its name
    "model/file", its sha256."""
    with _HashedFile(path) as stream:
        try:
            results = [
                _write_item(
                    _StorageWriterTransforms(),
                    stream,
                    _own_storage(tensor),
                    item,
                    path.name,
                    SerializationFormat.TORCH_SAVE,
                )
                for item, tensor in items
            ]
        except RuntimeError as error:  # torch says "file write failed" where the operating system said why
            raise stream.failure or error from error
        os.fsync(stream.file.fileno())
    return results, f"{path.parent.name}/{path.name}", stream.digest.hexdigest()


def _own_storage(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor`` in host memory and in a storage of its own: torch saves all of a view's
    storage."""
    return tensor.clone() if tensor.is_cpu and tensor.untyped_storage().nbytes() != tensor.nbytes else tensor.cpu()


class _HashedFile:
    """A file that hashes the bytes in memory as it writes them, so that a later read from disk is
    compared with them."""

    def __init__(self, path: Path):
        self.file = open(path, "wb", buffering=0)  # noqa: SIM115 - this object is the context manager
        self.digest, self.failure = hashlib.sha256(), None

    def write(self, data) -> int:
        view = memoryview(data).cast("B")
        written = 0
        while written < len(view):  # a raw file may take a part
            try:
                written += self.file.write(view[written:])
            except OSError as error:
                self.failure = OSError(error.errno, error.strerror, self.file.name)
                raise self.failure from error
        self.digest.update(view)
        return written

    def tell(self) -> int:
        return self.file.tell()

    def flush(self) -> None:
        self.file.flush()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()
