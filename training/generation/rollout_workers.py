"""The engine on the trainer's ranks: weights moved in, requests divided over replicas, completions
on every rank of the model."""

from __future__ import annotations

import gc
import importlib
import time
from collections.abc import Callable, Collection, Sequence
from types import ModuleType

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from training.config.shape import Shape
from training.distributed import groups
from training.errors import NoRoom
from training.generation import torch_ops
from training.generation.engine import Engine, EngineLimits
from training.generation.request import Completion, Request
from training.generation.weight_sync import Resharder
from training.models.language_model import Interleaved, LanguageModel


def family(shape: Shape) -> ModuleType:
    """Module training/models/FAMILY/decoder.py."""
    return importlib.import_module(f"training.models.{shape.family}.decoder")


def operations(device_type: str):
    """The engine's operations on a device: Triton's kernels on CUDA, else plain torch."""
    if device_type == "cuda":
        from training.generation import triton_ops

        return triton_ops
    return torch_ops


def _completions(engine: Engine, requests: list[Request]) -> tuple[list[Completion], str]:
    """Completions of ``requests``, and "" or why the engine has no room for them. It tries twice,
    because between two phases of training the allocator's memory may be fragmented. All ranks of a
    replica get the same."""
    # Ranks that share layers can't tell each other that one of them ran out of memory half way.
    errors = (NoRoom,) if engine.decoder.group else (NoRoom, torch.OutOfMemoryError)
    problem = ""
    for _ in range(2):
        try:
            return (engine.generate(requests) if requests else []), ""
        except errors as error:
            problem = str(error).splitlines()[0]
        engine.release()
        _free()
    return [], problem


def _free() -> None:
    """Return the device's unused memory to the driver."""
    if groups.device().type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


class Replicas:
    """Replicas of the engine that generate with a model in training.

    Each has ``tensor_parallel`` ranks (0: as in training) and no pipeline. A model-parallel group
    of TP x PP ranks has TP x PP / ``tensor_parallel`` replicas, which divide its requests.
    ``decode``: ids -> text, for stop strings. The constructor is collective over all ranks."""

    def __init__(
        self,
        model: LanguageModel | Interleaved,
        shape: Shape,
        limits: EngineLimits,
        stop_ids: int | Collection[int],
        tensor_parallel: int = 0,
        decode: Callable[[list[int]], str] | None = None,
    ):
        self.shape, self.limits, self.stop_ids, self.decode = shape, limits, stop_ids, decode
        self.size = tensor_parallel or parallel_state.get_tensor_model_parallel_world_size()
        self.resharder = Resharder(model, shape, self.size)
        self.model_group = parallel_state.get_model_parallel_group()
        self.report: dict[str, float] = {}
        """Metrics of the last call: see ``_metrics``."""

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """Completions in the requests' order, on every rank of the model-parallel group, each of
        which gives the same requests. A collective over all ranks; raises NoRoom on all where one
        has no memory for a cache."""
        began = time.monotonic()
        decoder = family(self.shape).Decoder(
            self.shape, self.resharder.weights(), operations(groups.device().type), self.resharder.group
        )
        reshard_seconds = time.monotonic() - began
        engine = Engine(decoder, self.limits, self.stop_ids, self.decode)
        own_indices = self._assigned(requests)[self.resharder.member // self.size]
        own_completions, problem = _completions(engine, [requests[index] for index in own_indices])
        if problem := groups.first_problem(problem):
            del engine, decoder
            _free()
            raise NoRoom(problem)
        gathered: list = [None] * self.model_group.size()
        dist.all_gather_object(gathered, (own_indices, own_completions, engine.stats), group=self.model_group)
        del engine, decoder  # cache, graphs and received weights: training needs the room
        _free()
        self.report = self._metrics([stats for _, _, stats in gathered[:: self.size]], reshard_seconds)
        completions = dict(pair for indices, results, _ in gathered for pair in zip(indices, results, strict=True))
        return [completions[index] for index in range(len(requests))]

    def _assigned(self, requests: Sequence[Request]) -> list[list[int]]:
        """Indices of each replica's requests. Replicas take distinct prompts in turn; requests with
        equal prompts stay together."""
        count = self.model_group.size() // self.size
        prompts: dict[tuple[int, ...], int] = {}
        assigned: list[list[int]] = [[] for _ in range(count)]
        for index, request in enumerate(requests):
            assigned[prompts.setdefault(tuple(request.prompt), len(prompts)) % count].append(index)
        return assigned

    def _metrics(self, stats: list, reshard_seconds: float) -> dict[str, float]:
        """Metrics of this model-parallel group's replicas: tokens of all, times of the slowest.
        ``reshard_gb`` is the memory of resharded weights, ``rollout_tail_share`` the share of the
        time in which less than a quarter of the rows were alive."""
        longest = max(stats, key=lambda one: one.seconds)
        return {
            "rollout_tokens_per_second": sum(one.tokens for one in stats) / max(longest.seconds, 1e-9),
            "seconds_prefill": longest.prefill_seconds,
            "seconds_decode": longest.decode_seconds,
            "seconds_reshard": reshard_seconds,
            "reshard_gb": self.resharder.extra_bytes / 1e9,
            "cache_gb": longest.cache_gb,
            "preemptions": float(sum(one.preemptions for one in stats)),
            "rollout_tail_share": longest.tail_share,
        }
