"""Writing checkpoints, while training waits or while it goes on.

A save has three parts: plan (what each rank owns), write (each rank its own files, no
communication), publish (at a step boundary: every rank has written, rank 0 adds descriptions and
checksums, renames the folder, moves ``latest``). With ``async_save`` the loop waits for the plan
and a copy of the tensors in host memory; threads write; a later boundary publishes.

Threads, and not megatron-core's forked writers: a fork of a process with CUDA, NCCL and gloo
threads copies their locks in any state; a killed rank's forks live on and write into a folder that
the next attempt uses; and one that dies (out of memory) leaves its parent waiting for ever. Writing
and hashing release Python's lock, so threads cost the loop little.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import time
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
    """A checkpoint could not be written; earlier ones are whole. The message names rank, file,
    cause and fix; ``kind`` is the class of the error."""

    def __init__(self, message: str, kind: str):
        super().__init__(message)
        self.kind = kind


@dataclass
class _Save:
    """One save under way on this rank."""

    iteration: int
    state: dict
    aside: Path
    started: float
    best: int
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
        """Write one checkpoint of all learners and ``state`` (JSON); returns when it is published
        or, with async_save, copied. That of the iteration ``best`` is kept.

        Raises SaveFailed on every rank where one can't write; nothing is left of the failed save
        then.
        """
        self.wait()
        began = time.monotonic()
        made = {
            "iteration": iteration,
            "made_with": format.made_with(self.trainer, next(iter(self.learners.values())).model),
            "optimizer_steps": {name: learner.schedule.num_steps for name, learner in self.learners.items()},
        }
        current = _Save(iteration, {**made, **state}, self.folder.temporary(iteration, "saving"), began, best)
        owned = {name: format.sharded(learner, is_loading=False) for name, learner in self.learners.items()}
        self._prepare(current, owned)
        current.plans = [
            strategies.plan(tensors, current.aside / name, validate=not self.is_validated)
            for name, tensors in owned.items()
        ]
        self.is_validated = True
        if self.allocating:
            self.allocating.result()
        staging = self.staging if self.trainer.async_save else None
        current.written = self.pool.submit(_write, [_freeze(plan.files, staging) for plan, _ in current.plans])
        if staging:
            staging.drop_unwanted()
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
            # Beside training, and after its first step, which makes the optimizer's state: pinning
            # takes 0.6 s a GB.
            owned = [format.sharded(learner, is_loading=False) for learner in self.learners.values()]
            mine = [
                tensor.data
                for tensor in nested_values(owned)
                if isinstance(tensor, ShardedTensor) and is_main_replica(tensor.replica_id)
            ]
            self.allocating = ThreadPoolExecutor(1, "pin", groups.begin_thread()).submit(self.staging.prepare, mine)
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
        """Publish what is being saved, if anything; returns when it is done and old checkpoints are
        deleted."""
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
        everyone = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
        dist.gather_object(digests, everyone)
        if everyone:
            self._attempt(
                current, self._publish, current, {name: made for rank in everyone for name, made in rank.items()}
            )
        self._agree(current)
        ended = time.monotonic()
        self.times["save_s"] = ended - current.started
        self._add_stall(ended - began)

    def _add_stall(self, seconds: float) -> None:
        self.times["save_stall_s"] = self.times.get("save_stall_s", 0.0) + seconds

    def _prepare(self, current: _Save, owned: dict[str, dict]) -> None:
        """Make the folders; refuse before anything is written where the file system lacks the
        room."""
        mine = (
            tensor
            for tensors in owned.values()
            for tensor in nested_values(tensors)
            if isinstance(tensor, ShardedTensor) and is_main_replica(tensor.replica_id)
        )
        needed = torch.tensor(float(sum(tensor.data.nbytes for tensor in mine)), dtype=torch.double)
        dist.all_reduce(needed)
        if dist.get_rank() == 0:
            self._attempt(current, self._make_folders, current.aside, needed.item())
        self._agree(current)

    def _make_folders(self, aside: Path, needed: float) -> None:
        self.folder.clear()
        for name in self.learners:
            (aside / name).mkdir(parents=True)
        free = shutil.disk_usage(self.folder.path).free
        if needed > free:
            raise OSError(errno.ENOSPC, f"No space left on device: it needs {needed / 1e9:,.3f} GB")

    def _publish(self, current: _Save, digests: dict[str, str]) -> None:
        (current.aside / "state.json").write_text(json.dumps(current.state, indent=1), encoding="utf-8")
        self.folder.publish(current.aside, current.iteration, digests)
        self.cleaning = self.pool.submit(self.folder.prune, current.iteration, self.trainer, current.best)

    def _attempt(self, current: _Save, function, *args):
        """``function(*args)``; a failure is kept for ``_agree``, so that no rank waits for one that
        has left."""
        try:
            return function(*args)
        except (OSError, RuntimeError) as error:
            current.error, current.kind = str(error), error_report.kind_of(error)
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                stage = self.folder.path
                current.error += f" ({shutil.disk_usage(stage).free / 1e9:,.3f} GB are free in {stage})"
        return None

    def _agree(self, current: _Save) -> None:
        """Raise SaveFailed on all ranks where ``current.error`` is set on one, with the first such
        rank's cause."""
        errors = [None] * dist.get_world_size()
        dist.all_gather_object(errors, (current.error, current.kind))
        failed = [(rank, error, kind) for rank, (error, kind) in enumerate(errors) if error]
        if not failed:
            return
        # every rank's threads have ended: nothing is written there any more
        if dist.get_rank() == 0:
            shutil.rmtree(current.aside, ignore_errors=True)
        last = self.folder.latest()
        kept = "nothing is saved yet" if last is None else f"iteration {last} is whole and what a resume starts from"
        rank, cause, kind = failed[0]
        raise SaveFailed(
            f"saving iteration {current.iteration} failed on rank {rank}: "
            f"{cause}; {kept}; make room or mend the file system, then resume",
            kind,
        )


class _Staging:
    """Host memory for the tensors of an asynchronous save, kept for the next one; pinned where they
    come from a GPU.

    Made by cudaHostRegister from memory of the right size: torch's own allocator of pinned memory
    rounds up to a power of two.
    """

    def __init__(self):
        self.buffers: dict[tuple[int, int], torch.Tensor] = {}
        """By address and bytes of the tensor that it is for: a weight and a part of it may begin at
        one address."""
        self.wanted: set[tuple[int, int]] = set()
        """Of the save that is being made."""

    def prepare(self, tensors: list[torch.Tensor]) -> None:
        for tensor in tensors:
            self._buffer(tensor)

    def copy(self, tensor: torch.Tensor) -> torch.Tensor:
        """``tensor`` in host memory, as soon as the device is synchronized."""
        held = self._buffer(tensor).view(tensor.dtype).view(tensor.shape)
        return held.copy_(tensor.detach(), non_blocking=True)

    def _buffer(self, tensor: torch.Tensor) -> torch.Tensor:
        key = tensor.data_ptr(), tensor.nbytes
        self.wanted.add(key)
        held = self.buffers.get(key)
        if held is None:
            # touched: pages that exist are pinned quickly
            held = torch.zeros(tensor.nbytes, dtype=torch.uint8)
            if tensor.is_cuda and tensor.nbytes:
                torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(held.data_ptr(), held.nbytes, 0))
            self.buffers[key] = held
        return held

    def drop_unwanted(self) -> None:
        """Give back what no tensor asked for since the last call: it has moved, or is gone."""
        for key in self.buffers.keys() - self.wanted:
            _unpin(self.buffers.pop(key))
        self.wanted.clear()

    def __del__(self):
        for held in self.buffers.values():
            _unpin(held)


def _unpin(memory: torch.Tensor) -> None:
    """A later tensor at this address can't be pinned else."""
    if torch.cuda.is_available() and memory.is_pinned():
        torch.cuda.cudart().cudaHostUnregister(memory.data_ptr())


Files = list[tuple[Path, list[tuple[WriteItem, torch.Tensor]]]]
"""(path, [(item, tensor)]) of each file."""


def _freeze(files: Files, staging: _Staging | None) -> Files:
    """The files with their tensors copied to ``staging``, so that training may change them; without
    it as they are."""
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
                    _StorageWriterTransforms(), stream, _alone(tensor), item, path.name, SerializationFormat.TORCH_SAVE
                )
                for item, tensor in items
            ]
        except RuntimeError as error:  # torch says "file write failed" where the operating system said why
            raise stream.failure or error from error
        os.fsync(stream.file.fileno())
    return results, f"{path.parent.name}/{path.name}", stream.digest.hexdigest()


def _alone(tensor: torch.Tensor) -> torch.Tensor:
    """In host memory and in a storage of its own: torch saves all of a view's storage."""
    return tensor.clone() if tensor.is_cpu and tensor.untyped_storage().nbytes() != tensor.nbytes else tensor.cpu()


class _HashedFile:
    """A file that hashes what is written, so that what a disk gives back later is compared with
    what memory held."""

    def __init__(self, path: Path):
        self.file = open(path, "wb", buffering=0)  # noqa: SIM115 - this object is the context manager
        self.digest, self.failure = hashlib.sha256(), None

    def write(self, data) -> int:
        view = memoryview(data).cast("B")
        done = 0
        while done < len(view):  # a raw file may take a part
            try:
                done += self.file.write(view[done:])
            except OSError as error:
                self.failure = OSError(error.errno, error.strerror, self.file.name)
                raise self.failure from error
        self.digest.update(view)
        return done

    def tell(self) -> int:
        return self.file.tell()

    def flush(self) -> None:
        self.file.flush()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()
