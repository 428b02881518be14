"""Tensors that wait in host memory while the GPU has no use for them.

Storages are moved, not tensors: an empty storage keeps its views (a parameter in megatron-core's
buffer, an optimizer's slice of it), and they are right again when it is full again. Copies run on
streams of their own, beside what the GPU computes. On the CPU the same is done with plain copies,
so that tests run what a GPU runs.
"""

from __future__ import annotations

import contextlib
import functools
import mmap
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

import torch

from training.distributed import groups
from training.models.language_model import LanguageModel

ALIGNMENT = 512
"""Bytes: each storage's place in the host buffer begins at a multiple."""
TOUCHERS = 8
"""Threads that make a buffer's pages: one alone takes longer than all copies of a run's first
iterations."""


class Offloaded:
    """The storages of ``tensors``, in host memory from now on, pinned where there is CUDA. ``wake``
    and ``sleep`` move them.

    Collect every tensor whose storage may be empty: one that is used while asleep is an error of
    CUDA, or garbage.
    """

    def __init__(self, tensors: Iterable[torch.Tensor]):
        device = groups.device().type
        storages = {
            tensor.untyped_storage().data_ptr(): tensor.untyped_storage()
            for tensor in tensors
            if tensor.device.type == device
        }
        self.storages = [storage for storage in storages.values() if storage.nbytes()]
        self.sizes = [storage.nbytes() for storage in self.storages]
        places = [-(-size // ALIGNMENT) * ALIGNMENT for size in self.sizes]
        self.buffer = host_memory(sum(places))
        self.host = self.buffer.split(places)
        self.awake = self.changed = True
        """``changed``: written since the host's copy was made; who writes sets it."""
        self.arrived: torch.cuda.Event | None = None
        self.sleep()

    def __del__(self):
        buffer = getattr(self, "buffer", None)  # none where it could not be made
        if buffer is not None and buffer.numel() and torch.cuda.is_available():
            torch.cuda.cudart().cudaHostUnregister(buffer.data_ptr())

    def wake(self) -> None:
        """Begin to copy to the device; ``ready`` comes before the first use. The device's memory is
        taken now."""
        if self.awake:
            return
        for storage, size in zip(self.storages, self.sizes, strict=True):
            storage.resize_(size)
        with _aside("in"):
            self._copy(to_host=False)
        self.arrived, self.awake = _event("in"), True

    def ready(self) -> None:
        """What is launched from now on finds the storages full."""
        self.wake()
        if self.arrived:
            torch.cuda.current_stream().wait_event(self.arrived)
            self.arrived = None

    def sleep(self, meanwhile: Offloaded | None = None) -> None:
        """Give the device's memory back, what has changed being copied to the host first.
        ``meanwhile``: another one that wakes at the same time (both directions of the bus are as
        fast as one), for which there must be room already."""
        if self.awake:
            self.ready()
            with _aside("out"):
                if self.changed:
                    self._copy(to_host=True)
            done = _event("out")
        if meanwhile:
            meanwhile.wake()
        if self.awake:
            # the memory's next owner writes on the current stream, the next wake reads the host's
            # on another
            if done:
                torch.cuda.current_stream().wait_event(done)
            for storage in self.storages:
                storage.resize_(0)
            self.awake = self.changed = False

    def _copy(self, to_host: bool) -> None:
        for storage, size, host in zip(self.storages, self.sizes, self.host, strict=True):
            there = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
            target, source = (host[:size], there) if to_host else (there, host[:size])
            target.copy_(source, non_blocking=True)


class Parked:
    """A frozen model whose weights are on the device only in ``with parked as model:``. Nothing is
    copied back: nobody writes them."""

    def __init__(self, model: LanguageModel):
        self.model, self.weights = model, Offloaded(model.parameters())

    def wake(self) -> None:
        """Begin to bring the weights, if that is ahead of their use."""
        self.weights.wake()

    def __enter__(self) -> LanguageModel:
        self.weights.ready()
        return self.model

    def __exit__(self, *_) -> None:
        self.weights.sleep()


def host_memory(size: int) -> torch.Tensor:
    """(size,) uint8 in host memory, not initialised, pinned where there is CUDA.

    Pages of the operating system, registered with CUDA: torch's own allocator of pinned memory
    rounds up to a power of two. Raises MemoryError where they can't be pinned: CUDA's own word for
    it, "out of memory", would be taken for the GPU's.
    """
    if not torch.cuda.is_available() or not size:
        return torch.empty(size, dtype=torch.uint8)
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    # large pages are made and pinned faster; a kernel without them does it in small ones
    with contextlib.suppress(OSError):
        pages.madvise(mmap.MADV_HUGEPAGE)
    made = torch.frombuffer(pages, dtype=torch.uint8)
    with ThreadPoolExecutor(TOUCHERS) as pool:
        list(pool.map(torch.Tensor.zero_, made.split(-(-size // (8 * TOUCHERS)))))
    runtime = torch.cuda.cudart()
    error = runtime.cudaHostRegister(made.data_ptr(), size, 0)
    if error != runtime.cudaError.success:
        raise MemoryError(
            f"{size / 1e9:.1f} GB of host memory can't be pinned (CUDA says {error}): free memory on this node, raise "
            'its limit of locked memory (ulimit -l), or set offload = "frozen" or "none"'
        )
    return made


@functools.cache
def _stream(way: str) -> torch.cuda.Stream:
    """One for each direction."""
    return torch.cuda.Stream()


def _aside(way: str):
    """What is launched inside runs on the stream of that direction, after all that was launched
    before."""
    if groups.device().type != "cuda":
        return contextlib.nullcontext()
    stream = _stream(way)
    stream.wait_stream(torch.cuda.current_stream())
    return torch.cuda.stream(stream)


def _event(way: str) -> torch.cuda.Event | None:
    return _stream(way).record_event() if groups.device().type == "cuda" else None
