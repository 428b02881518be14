"""The rollout engine: continuous batching over a paged key-value cache, in the trainer's own
process.

Each turn of the loop admits waiting rows, computes a chunk of their prompts into the cache and runs
one decode step of all ready rows. The first decode step computes a prompt's last token, so prefill
needs no logits and only decode steps sample. On a GPU the host reads a step's results while the
next step runs: the GPU never waits, and an ended row costs one step too many.

In fp32 a response depends on its request alone (prompt, sampling, uniforms), not on batch, order,
cache size or preemption. In bf16 these choose the kernels and thus the rounding of logits, so a
draw near the border of two tokens may fall to either.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from training.errors import NoRoom
from training.generation import tp_sampling
from training.generation.block_manager import Pages
from training.generation.cuda_graphs import Graphs, forward
from training.generation.request import Completion, Request, check
from training.generation.sampling import penalise
from training.generation.scheduler import PrefillChunk, Row, Scheduler
from training.generation.slots import BatchState
from training.models.kv_cache import Batch, token_bytes


@dataclass(frozen=True)
class EngineLimits:
    """Limits of one replica of the engine."""

    context: int
    """Most tokens of a row, prompt and response together."""
    rows: int = 512
    """Most rows that run at once."""
    cache_share: float = 0.9
    """Largest share of the GPU's free memory that the cache takes."""
    cache_tokens: int = 0
    """Most tokens that the cache holds; 0 = as many as memory and rows allow."""
    expected_fraction: float = 1.0
    """Share of its longest response that a row is expected to need until some rows have ended. Too
    small a share costs preemptions."""
    page: int = 32
    """Tokens of a page."""
    prefill_tokens: int = 8192
    """Most prompt tokens of one forward pass."""
    min_prefill_tokens: int = 1024
    """While rows run, new ones wait until their prompts have this many tokens together (or no more
    rows wait): a smaller forward pass costs as much."""


@dataclass
class Stats:
    """Statistics of one call of ``Engine.generate``."""

    tokens: int = 0
    """Response tokens returned."""
    steps: int = 0
    wasted: int = 0
    """Row-steps after a row's end, before the host knew."""
    preemptions: int = 0
    cache_gb: float = 0.0
    seconds: float = 0.0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    capture_seconds: float = 0.0
    """Part of ``decode_seconds`` that captured CUDA graphs."""
    tail_share: float = 0.0
    """Share of the time in which less than a quarter of the rows were alive."""


@dataclass
class PendingStep:
    """A launched decode step whose results have not been read."""

    rows: list[Row]
    tokens: torch.Tensor
    logprobs: torch.Tensor
    done: torch.cuda.Event | None = None
    """Passed when ``tokens`` and ``logprobs`` have arrived on the host."""


class Engine:
    """``decoder``: the model's forward pass on its weights (Decoder). ``stop_ids``: the id, or ids,
    that end a completion. ``decode``: ids -> text, for stop strings.

    ``async_output``: read a step's results while the next one runs (default: on CUDA). Collective
    over the decoder's tensor-parallel group: every rank gives the same requests and gets the same
    completions."""

    def __init__(
        self,
        decoder,
        limits: EngineLimits,
        stop_ids: int | Collection[int],
        decode: Callable[[list[int]], str] | None = None,
        async_output: bool | None = None,
    ):
        self.decoder, self.limits, self.decode = decoder, limits, decode
        self.stop_ids = frozenset((stop_ids,) if isinstance(stop_ids, int) else stop_ids)
        self.device = decoder.device
        self.async_output = self.device.type == "cuda" if async_output is None else async_output
        self.stats = Stats()
        self.cache: torch.Tensor | None = None
        self.graphs: Graphs | None = None
        self.prefills: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @torch.no_grad()
    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """A completion for each request, in order. Raises, before anything runs, ConfigError where
        one can't be served, NoRoom where the cache has no room for it."""
        check(requests, self.decoder.vocab, self.limits.context, self.decode is not None)
        self.stats = Stats()
        if not any(request.sampling.max_new_tokens for request in requests):
            return [Completion([], [], "length") for _ in requests]
        scheduler = Scheduler(
            requests, self._prepare(requests), min(self.limits.rows, len(requests)), self.limits.expected_fraction
        )
        self._run(scheduler)
        return [Completion(row.tokens, row.logprobs, row.reason) for row in scheduler.rows]

    def release(self) -> None:
        """Free the memory of cache and graphs; the next call allocates it again."""
        self.cache = self.graphs = None

    def _prepare(self, requests: Sequence[Request]) -> Pages:
        """Allocate cache and slots for those ``requests`` that generate tokens, as large as they
        need or memory allows -> the cache's pages. Raises NoRoom where the longest request does not
        fit."""
        limits, decoder = self.limits, self.decoder
        numbers = [number for number, request in enumerate(requests) if request.sampling.max_new_tokens]
        requests = [requests[number] for number in numbers]
        rows = min(limits.rows, len(requests))
        longest = [-(-(len(request.prompt) + request.sampling.max_new_tokens) // limits.page) for request in requests]
        page_bytes = limits.page * token_bytes(decoder.layers, decoder.kv_heads, decoder.head_dim, decoder.dtype)
        pages = min(sum(sorted(longest)[-rows:]), self._affordable(page_bytes, rows))
        if max(longest) > pages:
            number = numbers[longest.index(max(longest))]
            raise NoRoom(
                f"request {number} needs {max(longest)} pages of {limits.page} tokens, "
                f"the cache has room for {pages} ({pages * page_bytes / 1e9:.2f} GB); "
                "free GPU memory, raise cache_share or cache_tokens, or ask for less"
            )
        shape = (decoder.layers, 2, pages + 1, decoder.kv_heads, limits.page, decoder.head_dim)
        if self.cache is None or self.cache.size(2) < pages + 1:
            self.cache = None
            self.cache = torch.zeros(shape, dtype=decoder.dtype, device=self.device)
        self.slots = BatchState(
            rows,
            max(longest),
            max(request.sampling.max_new_tokens for request in requests),
            decoder.vocab,
            any(request.sampling.repetition_penalty != 1 for request in requests),
            self.device,
        )
        if self.device.type == "cuda":
            self.graphs = Graphs(decoder, self.cache, self.slots, limits.page, limits.context)
        self.stats.cache_gb = self.cache.numel() * self.cache.element_size() / 1e9
        return Pages(pages, limits.page)

    def _affordable(self, page_bytes: int, rows: int) -> int:
        """Pages that fit in memory, the same number on all ranks of the group. Room is left for
        page 0, a prefill and a step's logits (twice, fp32)."""
        pages = self.limits.cache_tokens // self.limits.page if self.limits.cache_tokens else 1 << 40
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            cache_bytes = self.cache.numel() * self.cache.element_size() if self.cache is not None else 0
            free = torch.cuda.mem_get_info(self.device)[0] + cache_bytes
            working = max(self.decoder.workspace(self.limits.prefill_tokens), rows * self.decoder.vocab * 8)
            pages = max(min(pages, int((free * self.limits.cache_share - working) / page_bytes) - 1), 0)
        if self.decoder.group:
            fewest = torch.tensor(pages, device=self.device)
            dist.all_reduce(fewest, dist.ReduceOp.MIN, group=self.decoder.group)
            pages = int(fewest)
        return pages

    def _run(self, scheduler: Scheduler) -> None:
        began, pending, all_rows = time.monotonic(), None, sum(not row.reason for row in scheduler.rows)
        quarter = None
        while scheduler.running or scheduler.waiting:
            admitted = scheduler.admit(self.limits.min_prefill_tokens)
            if admitted:
                self.slots.enter(admitted)
            chunks = scheduler.prefill(self.limits.prefill_tokens)
            if chunks:
                with self._timed():
                    self._prefill(chunks)
            # Throughput, not latency: finish prefills before decoding, so that decode batches are
            # full.
            ready = [] if chunks else scheduler.ready()
            if scheduler.missing(ready) > 0:
                if pending:
                    pending = self._collect(scheduler, pending)
                else:
                    scheduler.preempt()
                continue
            previous, pending = pending, self._decode(scheduler, ready) if ready else None
            if previous:
                self._collect(scheduler, previous)
            if pending and not self.async_output:
                pending = self._collect(scheduler, pending)
            if quarter is None and 4 * (len(scheduler.running) + len(scheduler.waiting)) < all_rows:
                quarter = time.monotonic()
        if self.device.type == "cuda":
            torch.cuda.synchronize()  # a step of ended rows may still run, on the cache
        self._report(scheduler, began, quarter)

    def _prefill(self, chunks: list[PrefillChunk]) -> None:
        """Compute ``chunks`` into the cache."""
        put, slots = self.slots.put, self.slots
        tokens = put([token for chunk in chunks for token in chunk.row.text(chunk.first, chunk.count)], torch.int64)
        position = put([chunk.first + i for chunk in chunks for i in range(chunk.count)], torch.int64)
        owner = put([i for i, chunk in enumerate(chunks) for _ in range(chunk.count)], torch.int64)
        starts = [0]
        for chunk in chunks:
            starts.append(starts[-1] + chunk.count)
        lengths = [chunk.first + chunk.count for chunk in chunks]
        table = slots.table[put([chunk.row.slot for chunk in chunks], torch.int64)]
        batch = Batch(
            table,
            put(lengths, torch.int64),
            position,
            self.limits.page,
            max(lengths),
            put(starts, torch.int64),
            [chunk.count for chunk in chunks],
            owner,
        )
        self.decoder.prefill(tokens, self.cache, batch)

    def _decode(self, scheduler: Scheduler, rows: list[Row]) -> PendingStep:
        """Launch one decode step of ``rows``."""
        grown = scheduler.step(rows)
        if grown:
            self.slots.pages_of(grown)
        slots = self.slots
        index = slots.put([row.slot for row in rows], torch.int64)
        if self.graphs:
            hidden = self.graphs.hidden(index)
        else:
            hidden = forward(self.decoder, self.cache, slots, index, self.limits.page, max(row.cached for row in rows))
        tokens, logprobs = self._sample(hidden, index, any(row.request.sampling.truncates for row in rows))
        slots.sampled(index, tokens)
        self.stats.steps += 1
        if self.device.type != "cuda":
            return PendingStep(rows, tokens, logprobs)
        pending = PendingStep(
            rows, tokens.to("cpu", non_blocking=True), logprobs.to("cpu", non_blocking=True), torch.cuda.Event()
        )
        pending.done.record()
        return pending

    def _sample(self, hidden: torch.Tensor, index: torch.Tensor, truncates: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens (B,) and log-probabilities (B,) that follow ``hidden`` (B, H) of the rows in slots
        ``index`` (B,)."""
        slots, decoder = self.slots, self.decoder
        logits, temperature, uniforms = (
            decoder.logits(hidden),
            slots.temperature[index],
            slots.uniforms[index, slots.step[index]],
        )
        if decoder.group:
            if not truncates and slots.seen is None:
                return tp_sampling.choose(decoder.ops, logits, temperature, uniforms, decoder.group)
            logits = decoder.gather(logits)
        if slots.seen is not None:
            logits = penalise(logits, slots.seen[index], slots.penalty[index])
        truncation = (slots.top_k[index], slots.top_p[index]) if truncates else ()
        return decoder.ops.choose(logits, temperature, uniforms, *truncation)

    def _collect(self, scheduler: Scheduler, pending: PendingStep) -> None:
        """Read a step's results, and finish the rows that ended."""
        if pending.done:
            pending.done.synchronize()
        for row, token, logprob in zip(pending.rows, pending.tokens.tolist(), pending.logprobs.tolist(), strict=True):
            if row.reason:
                self.stats.wasted += 1
                continue
            row.tokens.append(token)
            row.logprobs.append(logprob)
            reason = self._ended(row)
            if reason:
                scheduler.finish(row, reason)

    @contextlib.contextmanager
    def _timed(self):
        """Count the block's time as prefill; by events where work is asynchronous."""
        if self.device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            yield
            end.record()
            self.prefills.append((begin, end))
        else:
            began = time.monotonic()
            yield
            self.stats.prefill_seconds += time.monotonic() - began

    def _ended(self, row: Row) -> str:
        sampling, tokens = row.request.sampling, row.tokens
        if tokens[-1] in self.stop_ids:
            return "eos"
        if any(len(stop) <= len(tokens) and tuple(tokens[-len(stop) :]) == stop for stop in sampling.stop):
            return "stop"
        if sampling.stop_strings:
            # A token is a byte or more: a stop text can't reach back farther than its bytes, and
            # one cut character more.
            tail = self.decode(tokens[-max(len(text.encode()) for text in sampling.stop_strings) - 4 :])
            if any(text in tail for text in sampling.stop_strings):
                return "stop"
        return "length" if len(tokens) == sampling.max_new_tokens else ""

    def _report(self, scheduler: Scheduler, began: float, quarter: float | None) -> None:
        stats, end = self.stats, time.monotonic()
        stats.tokens = sum(len(row.tokens) for row in scheduler.rows)
        stats.preemptions, stats.seconds = scheduler.preemptions, end - began
        stats.prefill_seconds += sum(begin.elapsed_time(after) for begin, after in self.prefills) / 1e3
        stats.decode_seconds = stats.seconds - stats.prefill_seconds
        self.prefills.clear()
        stats.capture_seconds = self.graphs.seconds if self.graphs else 0.0
        stats.tail_share = (end - quarter) / stats.seconds if quarter else 0.0
