"""Let megatron-core run in CPU processes (tests, the demo, a laptop). Never entered where CUDA
exists.

megatron-core 0.16.1 has no CPU path: it takes its device from ``torch.cuda.current_device()``,
writes ``device="cuda"`` into tensor factories, keeps dropout state in the CUDA generator, orders
work with CUDA streams and recognises parameters by their CUDA type names. ``mcore_on_cpu()``
answers these questions from the CPU for the code inside the block, on this thread.
"""

from __future__ import annotations

import contextlib
import logging

import torch
from torch.overrides import TorchFunctionMode

CPU = torch.device("cpu")


class _CudaMeansCpu(TorchFunctionMode):
    """Redirect CUDA device literals in torch calls to the CPU."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        device = kwargs.get("device")
        if device is not None and torch.device(device).type == "cuda":
            kwargs = {**kwargs, "device": CPU}
        if func is torch.Tensor.cuda:
            return args[0]
        result = func(*args, **kwargs)
        # optimizers test for 'torch.cuda.FloatTensor'
        if func is torch.Tensor.type and isinstance(result, str):
            return result.replace("torch.", "torch.cuda.", 1)
        return result


class _InOrder:
    """A CUDA stream or event where all work is already in order."""

    def __init__(self, *args, **kwargs):
        pass

    def _done(self, *args, **kwargs):
        return None

    record = wait = wait_event = wait_stream = record_event = synchronize = _done


def _ignore(*args, **kwargs):
    return None


def _replacements():
    from megatron.core.tensor_parallel import random as mcore_random

    return [
        (torch.cuda, "current_device", lambda: CPU),
        (torch.cuda, "synchronize", _ignore),
        (torch.cuda, "empty_cache", _ignore),
        (torch.cuda, "Stream", _InOrder),
        (torch.cuda, "Event", _InOrder),
        (torch.cuda, "current_stream", _InOrder),
        (torch.cuda, "default_stream", _InOrder),
        (torch.cuda, "stream", lambda stream: contextlib.nullcontext()),
        # Without CUDA these four are queued without end instead of failing: seeds would be ignored
        # silently.
        (torch.cuda, "manual_seed", torch.default_generator.manual_seed),
        (torch.cuda, "get_rng_state", lambda device=None: torch.get_rng_state()),
        (torch.cuda, "set_rng_state", lambda state, device=None: torch.set_rng_state(state)),
        (mcore_random, "_get_cuda_rng_state", lambda *_, **__: torch.get_rng_state()),
        (mcore_random, "_set_cuda_rng_state", lambda state, *_, **__: torch.set_rng_state(state)),
    ]


def _not_about_our_generator(record: logging.LogRecord) -> bool:
    """The tracker warns when the CPU generator moves inside a fork; here it is the forked one."""
    return "CPU RNG state changed" not in record.getMessage()


@contextlib.contextmanager
def mcore_on_cpu():
    """Redirect megatron-core's CUDA calls to the CPU; everything is restored on exit. Raises
    RuntimeError where CUDA exists."""
    if torch.cuda.is_available():
        raise RuntimeError("mcore_on_cpu() on a machine with CUDA")
    logger = logging.getLogger("megatron.core.tensor_parallel.random")
    with contextlib.ExitStack() as stack:
        for owner, name, value in _replacements():
            stack.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, value)
        logger.addFilter(_not_about_our_generator)
        stack.callback(logger.removeFilter, _not_about_our_generator)
        # megatron-core's jit_fuser is torch.compile
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(_CudaMeansCpu())
        yield
