"""How fast is the rollout engine, and is it right on a GPU? ``python
benchmarks/generation/rollout.py STEP ... [--small]``

    kernels   attention, norms and sampling against plain torch in fp64
    greedy    200 prompts through a small model in fp32: Hugging Face's tokens?
    tune      the decode kernel's sizes: TB/s of keys and values read at batch 128, context 512
    agree     bloom-7b1's shape in bf16: log-probabilities of sampled tokens against the training
              forward's
    step      a decode step at batch 128 and 256, context 512: its time, the least that reading
              the memory takes, and the time of its parts
    cases     (a) 128 prompts of 256 + 256 new tokens, (b) 512 of these, (c) 512 prompts of 256 with
              output lengths uniform in 32..512
    peer      Hugging Face's generate on the same shape: case (a)

Weights are random (a step's time does not depend on them), EOS is ignored. Prints JSON lines. A
line with "ok": false is a missed tolerance, and the exit code is then 1. ``--small`` takes tiny
shapes, to try the script on a CPU.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from transformers import BloomConfig, BloomForCausalLM

from benchmarks.common import missed, print_row, sft_config
from benchmarks.device import DEVICE, PRECISION, free_memory
from benchmarks.generation.correctness import OPS, greedy, kernels, paged
from benchmarks.shapes import SHAPES
from training.distributed import groups
from training.generation.engine import Engine, EngineLimits
from training.generation.request import Request, Sampling, draws
from training.generation.weight_sync import named_weights
from training.models import chunked_logprobs
from training.models.attention import alibi_slopes
from training.models.bloom.decoder import Decoder
from training.models.heads import next_token_logprobs
from training.models.kv_cache import Batch
from training.trainer.step import build_model, evaluate

BIG, SMALL = SHAPES["7b1"], SHAPES["small"]


def tune(small: bool) -> None:
    """Sizes of the decode kernel; triton_ops.DECODE and EngineLimits.page have the fastest."""
    if DEVICE != "cuda":
        return
    print_row(step="tune", copy_tb_per_second=bandwidth() / 1e12)
    for page in (32, 64):
        cache, qkv, batch = paged(32, 1, 128, page, [512] * 128, None, torch.bfloat16)
        where, slopes = batch(), alibi_slopes(32).to(DEVICE)
        for keys, warps, stages in (
            (32, 2, 3),
            (32, 4, 3),
            (64, 4, 2),
            (64, 4, 3),
            (64, 8, 2),
            (128, 8, 2),
            (128, 4, 2),
        ):
            OPS.DECODE = dict(BLOCK_N=keys, num_warps=warps, STAGES=stages)
            ms = milliseconds(lambda: OPS.attend(cache, qkv[:, :, :1], where, slopes, 128**-0.5))  # noqa: B023
            print_row(
                step="tune",
                page=page,
                keys=keys,
                warps=warps,
                stages=stages,
                ms=ms,
                tb_per_second=2 * 128 * 512 * 4096 * 2 / ms / 1e9,
            )


def milliseconds(function) -> float:
    """Median over calls, after one that compiles. The buffers are larger than the GPU's cache."""
    function()
    torch.cuda.synchronize()
    times = []
    for _ in range(15):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        function()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    return sorted(times)[7]


def bandwidth() -> float:
    """Bytes a second of a device copy, read + write."""
    source, target = (torch.randint(0, 9, (2**31,), dtype=torch.uint8, device=DEVICE) for _ in range(2))
    return 2 * 2**31 / milliseconds(lambda: target.copy_(source)) * 1e3


def policy(small: bool):
    """A random model in training, bf16 on a GPU, and the engine's decoder on its own weights."""
    shape = SMALL if small else BIG
    config = sft_config(precision=PRECISION, attention="sdpa")
    torch.manual_seed(0)
    model = build_model(shape, config, "lm")
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, 1.0 if "layernorm.weight" in name else 0.0, 0.02)
    weights = {name: parameter.detach() for name, parameter in named_weights(model).items()}
    return shape, model, Decoder(shape, weights, OPS)


def requests(rows: int, prompt: int, outputs: list[int], vocab: int, temperature: float = 1.0) -> list[Request]:
    generator = torch.Generator().manual_seed(1)
    uniforms = draws(1, 0, rows, max(outputs))
    return [
        Request(torch.randint(0, vocab, (prompt,), generator=generator).tolist(), Sampling(new, temperature), row)
        for new, row in zip(outputs, uniforms, strict=True)
    ]


def agree(small: bool) -> None:
    """Log-probabilities of sampled tokens by the engine, by the training forward, and by the
    engine's own forward in fp32.

    fp32: within 1e-4. bf16: .005 is our goal for a trained model. The logits of a random model are
    rounding noise only, so here the engine must be no farther from fp32 than the training forward
    is. The last two numbers show the head's share of the training forward's error: with logits
    rounded to bf16, and with a head that rounds nothing.
    """
    shape, model, decoder = policy(small)
    rows, prompt, new = (4, 9, 7) if small else (32, 256, 256)
    prompts = requests(rows, prompt, [new] * rows, shape.vocab)
    replies = Engine(decoder, EngineLimits(prompt + new), -1).generate(prompts)
    engine = torch.tensor([reply.logprobs for reply in replies])
    tokens = torch.tensor([[*request.prompt, *reply.tokens] for request, reply in zip(prompts, replies, strict=True)])
    training = training_logprobs(model, tokens, prompt)
    fp32 = {name: parameter.detach().float() for name, parameter in named_weights(model).items()}
    fp32_decoder = Decoder(shape, fp32, OPS)
    exact = torch.cat([engine_logprobs(fp32_decoder, part) for part in tokens.split(4)])[:, prompt - 1 :]

    def difference(left, right):
        return (left - right).abs().mean().item()

    def with_head(product):
        return difference(training_logprobs(model, tokens, prompt, product), exact)

    differences = {
        "engine_to_training": difference(engine, training),
        "engine_to_fp32": difference(engine, exact),
        "training_to_fp32": difference(training, exact),
        "training_with_bf16_logits_to_fp32": with_head(lambda hidden, weight: (hidden @ weight.t()).float()),
        "training_with_an_fp32_head_to_fp32": with_head(lambda hidden, weight: hidden.float() @ weight.float().t()),
    }
    if DEVICE == "cuda":
        agrees = differences["engine_to_fp32"] <= differences["training_to_fp32"]
    else:
        agrees = differences["engine_to_training"] < 1e-4
    print_row(
        agrees,
        step="agree",
        tokens=engine.numel(),
        **differences,
        largest=(engine - training).abs().max().item(),
        signed=(engine - training).mean().item(),
    )


def training_logprobs(model, tokens: torch.Tensor, prompt: int, product=chunked_logprobs.product) -> torch.Tensor:
    """(B, T - prompt) log-probabilities of ``tokens`` (B, T) by the training forward. ``product``
    computes its head's logits."""
    before, chunked_logprobs.product = chunked_logprobs.product, product
    try:
        logprobs = evaluate(
            model, {"tokens": tokens}, 4, lambda output, micro: next_token_logprobs(output, micro["tokens"])
        )
    finally:
        chunked_logprobs.product = before
    return logprobs[:, prompt:].cpu()


@torch.no_grad()
def engine_logprobs(decoder: Decoder, tokens: torch.Tensor) -> torch.Tensor:
    """(B, T - 1) log-probabilities of ``tokens`` (B, T) without the first, by one forward pass of
    the engine's decoder."""
    rows, length = tokens.shape
    page, pages = 32, -(-length // 32)
    cache = torch.zeros(
        decoder.layers,
        2,
        rows * pages + 1,
        decoder.kv_heads,
        page,
        decoder.head_dim,
        dtype=decoder.dtype,
        device=DEVICE,
    )
    table = (torch.arange(rows * pages, device=DEVICE, dtype=torch.int32) + 1).view(rows, pages)
    lengths, position = torch.full((rows,), length, device=DEVICE), torch.arange(length, device=DEVICE).repeat(rows)
    starts = torch.arange(rows + 1, device=DEVICE) * length
    owner = torch.arange(rows, device=DEVICE).repeat_interleave(length)
    batch = Batch(table, lengths, position, page, length, starts, [length] * rows, owner)
    hidden = decoder.last_hidden(tokens.to(DEVICE).flatten(), cache, batch).view(rows, length, -1)
    logprobs = [
        decoder.logits(row[:-1]).log_softmax(-1).gather(-1, ids[1:, None]).squeeze(1)
        for row, ids in zip(hidden, tokens.to(DEVICE), strict=True)
    ]
    return torch.stack(logprobs).cpu()


def step(small: bool) -> None:
    """Median time between two steps of a full batch, all rows at 512 +- 32 tokens; then the time of
    a step's parts."""
    shape, _, decoder = policy(small)
    prompt, new = (12, 8) if small else (480, 64)
    for rows in (4, 8) if small else (128, 256):
        engine, times = Engine(decoder, EngineLimits(prompt + new, rows=rows), -1), []
        collect = engine._collect
        engine._collect = lambda *values: (collect(*values), times.append(time.monotonic()))[0]  # noqa: B023
        for _ in range(2):  # the first compiles
            times.clear()
            engine.generate(requests(rows, prompt, [new] * rows, shape.vocab))
        apart = sorted(after - before for before, after in zip(times, times[1:], strict=False))
        ms = 1e3 * apart[len(apart) // 2]
        read = 2 * shape.parameters() + 4 * shape.layers * shape.hidden * rows * (prompt + new // 2)
        floor = 1e3 * read / bandwidth() if DEVICE == "cuda" else 0.0
        print_row(
            step="step",
            rows=rows,
            context=prompt + new // 2,
            ms=ms,
            tokens_per_second=1e3 * rows / ms,
            floor_ms=floor,
            of_floor=floor / ms,
            slowest=1e3 * apart[-1],
            seconds=engine.stats.seconds,
            prefill_tokens_per_second=rows * prompt / engine.stats.prefill_seconds,
        )
        if DEVICE == "cuda":
            parts_of_a_step(engine, rows)
        engine.release()


GROUPS = {
    "attention": ("_decode", "_join"),
    "norms, cache writes, gelu": ("_residual_norm", "_write", "elu", "layer_norm"),
    "layer products": ("gemm", "nvjet", "cutlass", "splitK", "cublas"),
}
"""Group -> parts of its kernels' names."""


def parts_of_a_step(engine: Engine, rows: int) -> None:
    """Milliseconds of a step's kernels, by group, at the last state of ``engine``. Head and
    sampling are timed on their own."""
    from torch.profiler import ProfilerActivity, profile

    index, slots, calls = torch.arange(rows, device=DEVICE), engine.slots, 8
    hidden = engine.graphs.hidden(index).clone()
    logits = engine.decoder.logits(hidden)
    temperature, uniforms = slots.temperature[index], slots.uniforms[index, 0]
    p = torch.full((rows,), 0.9, device=DEVICE)
    spent = {
        "head": milliseconds(lambda: engine.decoder.logits(hidden)),
        "sampling": milliseconds(lambda: OPS.choose(logits, temperature, uniforms)),
        "sampling with top-p": milliseconds(lambda: OPS.choose(logits, temperature, uniforms, slots.top_k[index], p)),
        "graph": milliseconds(lambda: engine.graphs.hidden(index)),
    }
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        for _ in range(calls):
            engine.graphs.hidden(index)
        torch.cuda.synchronize()
    events = [
        (event.device_time_total / 1e3 / calls, event.count // calls, event.key) for event in trace.key_averages()
    ]
    for ms, _, key in events:
        group = next((name for name, parts in GROUPS.items() if any(part in key for part in parts)), "other")
        spent[group] = spent.get(group, 0.0) + ms
    print_row(step="parts", rows=rows, **spent)
    for ms, count, key in sorted(events, reverse=True)[:10]:
        print_row(step="kernel", ms=ms, count=count, name=key[:60])


def cases(small: bool) -> None:
    shape, _, decoder = policy(small)
    many, prompt, new = (16, 12, 8) if small else (512, 256, 256)
    spread = torch.randint(
        4 if small else 32, 2 * new + 1, (many,), generator=torch.Generator().manual_seed(2)
    ).tolist()
    engine = Engine(decoder, EngineLimits(prompt + 2 * new), -1)
    engine.generate(requests(many // 4, prompt, [new // 4] * (many // 4), shape.vocab))  # compiles
    for name, outputs in (("a", [new] * (many // 4)), ("b", [new] * many), ("c", spread)):
        engine.release()
        replies = engine.generate(requests(len(outputs), prompt, outputs, shape.vocab))
        assert [len(reply.tokens) for reply in replies] == outputs
        stats = engine.stats
        print_row(
            step="cases",
            case=name,
            rows=len(outputs),
            prompt=prompt,
            new=sum(outputs),
            tokens_per_second=stats.tokens / stats.seconds,
            seconds=stats.seconds,
            prefill=stats.prefill_seconds,
            decode=stats.decode_seconds,
            capture=stats.capture_seconds,
            steps=stats.steps,
            cache_gb=stats.cache_gb,
            preemptions=stats.preemptions,
            tail_share=stats.tail_share,
        )
    engine.release()


def peer(small: bool) -> None:
    shape = SMALL if small else BIG
    rows, prompt, new = (4, 12, 8) if small else (128, 256, 256)
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float32
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(DEVICE):
            config = BloomConfig(
                vocab_size=shape.vocab, hidden_size=shape.hidden, n_layer=shape.layers, n_head=shape.heads
            )
            model = BloomForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)
    tokens = torch.randint(0, shape.vocab, (rows, prompt), device=DEVICE)
    for steps in (4, new):
        began = time.monotonic()
        with torch.no_grad():
            output = model.generate(
                input_ids=tokens,
                attention_mask=torch.ones_like(tokens),
                do_sample=True,
                top_k=0,
                max_new_tokens=steps,
                min_new_tokens=steps,
                eos_token_id=None,
                pad_token_id=3,
            )
        assert output.size(1) == prompt + steps
        seconds = time.monotonic() - began
    print_row(
        step="peer",
        peer="transformers generate",
        rows=rows,
        prompt=prompt,
        new=rows * new,
        seconds=seconds,
        tokens_per_second=rows * new / seconds,
    )


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    steps = {function.__name__: function for function in (kernels, greedy, tune, agree, step, cases, peer)}
    parser.add_argument("steps", nargs="+", choices=[*steps, "all"])
    parser.add_argument("--small", action="store_true")
    options = parser.parse_args(arguments)
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="29512")
    print_row(torch=torch.__version__, device=torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu")
    with groups.ranks(1, 1, seed=1):
        for name in steps if "all" in options.steps else options.steps:
            began = time.monotonic()
            try:
                steps[name](options.small)
            except Exception:  # noqa: BLE001 - the other steps still run
                traceback.print_exc()
                print_row(False, step=name, failed=True)
            free_memory()
            print_row(step=name, took=time.monotonic() - began)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
