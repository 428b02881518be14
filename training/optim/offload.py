"""Offload tensors to host memory while the GPU does not need them.

Storages are moved, not tensors. An empty storage keeps its views (a parameter in megatron-core's
buffer, an optimizer's slice of it), and their values are back when the storage is full again.
Copies run on streams of their own while the GPU computes. On the CPU the same code makes plain
copies, so that tests run what a GPU runs.
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
"""Bytes. The offset of each storage in the host buffer is a multiple of it."""
PAGE_THREADS = 8
"""Threads that touch a buffer's pages first: one alone takes longer than all copies of a run's
first iterations."""


class Offloaded:
    """The storages of ``tensors``, in host memory from now on, pinned where there is CUDA.
    ``prefetch`` and ``offload`` move them.

    Pass every tensor whose storage may be empty: the use of an offloaded one is an error of CUDA,
    or reads garbage.
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
        aligned = [-(-size // ALIGNMENT) * ALIGNMENT for size in self.sizes]
        self.buffer = host_memory(sum(aligned))
        self.host = self.buffer.split(aligned)
        self.on_device = self.changed = True
        """``changed``: the device's copy was written since the host's was made. The writer sets
        it."""
        self.copied: torch.cuda.Event | None = None
        self.offload()

    def __del__(self):
        buffer = getattr(self, "buffer", None)  # missing where host_memory has raised
        if buffer is not None and buffer.numel() and torch.cuda.is_available():
            torch.cuda.cudart().cudaHostUnregister(buffer.data_ptr())

    def prefetch(self) -> None:
        """Allocate the device's memory and begin to copy to it. Call ``wait`` before the first
        use."""
        if self.on_device:
            return
        for storage, size in zip(self.storages, self.sizes, strict=True):
            storage.resize_(size)
        with _side_stream("in"):
            self._copy(to_host=False)
        self.copied, self.on_device = _record_event("in"), True

    def wait(self) -> None:
        """Let all work that is launched from now on wait until the storages are full."""
        self.prefetch()
        if self.copied:
            torch.cuda.current_stream().wait_event(self.copied)
            self.copied = None

    def offload(self, meanwhile: Offloaded | None = None) -> None:
        """Free the device's memory; what has changed is copied to the host first.

        ``meanwhile`` is prefetched at the same time, because both directions of the bus together
        are as fast as one. The device must have room for it already.
        """
        if self.on_device:
            self.wait()
            with _side_stream("out"):
                if self.changed:
                    self._copy(to_host=True)
            done = _record_event("out")
        if meanwhile:
            meanwhile.prefetch()
        if self.on_device:
            # The memory's next owner writes on the current stream; the next prefetch reads the
            # host's copy on another.
            if done:
                torch.cuda.current_stream().wait_event(done)
            for storage in self.storages:
                storage.resize_(0)
            self.on_device = self.changed = False

    def _copy(self, to_host: bool) -> None:
        for storage, size, host in zip(self.storages, self.sizes, self.host, strict=True):
            on_device = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
            target, source = (host[:size], on_device) if to_host else (on_device, host[:size])
            target.copy_(source, non_blocking=True)


class OffloadedModel:
    """A frozen model whose weights are on the device only in ``with offloaded as model:``. Nothing
    is copied back, because the weights do not change."""

    def __init__(self, model: LanguageModel):
        self.model, self.weights = model, Offloaded(model.parameters())

    def prefetch(self) -> None:
        """Begin to copy the weights to the device ahead of their use."""
        self.weights.prefetch()

    def __enter__(self) -> LanguageModel:
        self.weights.wait()
        return self.model

    def __exit__(self, *_) -> None:
        self.weights.offload()


def host_memory(size: int) -> torch.Tensor:
    """Return (size,) uint8 in host memory, not initialised, pinned where there is CUDA.

    The pages are the operating system's, registered with CUDA: torch's own allocator of pinned
    memory rounds up to a power of two. Raises MemoryError where they can't be pinned. (CUDA's own
    message, "out of memory", would be mistaken for the GPU's.)
    """
    if not torch.cuda.is_available() or not size:
        return torch.empty(size, dtype=torch.uint8)
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    # Huge pages are allocated and pinned faster. A kernel without them takes small ones.
    with contextlib.suppress(OSError):
        pages.madvise(mmap.MADV_HUGEPAGE)
    buffer = torch.frombuffer(pages, dtype=torch.uint8)
    with ThreadPoolExecutor(PAGE_THREADS) as pool:
        list(pool.map(torch.Tensor.zero_, buffer.split(-(-size // (8 * PAGE_THREADS)))))
    runtime = torch.cuda.cudart()
    error = runtime.cudaHostRegister(buffer.data_ptr(), size, 0)
    if error != runtime.cudaError.success:
        raise MemoryError(
            f"{size / 1e9:.1f} GB of host memory can't be pinned (CUDA says {error}): free memory on this node, raise "
            'its limit of locked memory (ulimit -l), or set offload = "frozen" or "none"'
        )
    return buffer


@functools.cache
def _stream(direction: str) -> torch.cuda.Stream:
    return torch.cuda.Stream()


def _side_stream(direction: str):
    """Return a context whose work runs on the stream of ``direction``, after all work that was
    launched before."""
    if groups.device().type != "cuda":
        return contextlib.nullcontext()
    stream = _stream(direction)
    stream.wait_stream(torch.cuda.current_stream())
    return torch.cuda.stream(stream)


def _record_event(direction: str) -> torch.cuda.Event | None:
    return _stream(direction).record_event() if groups.device().type == "cuda" else None
