"""The parts of benchmarks/multi_gpu/suite.py that measure speed: SFT steps, moving the weights to
another layout, PPO's phases."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import math
import statistics
import time
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist

from benchmarks.device import PRECISION, free_memory, median_seconds, peak_gb, reset_peak, synchronize
from benchmarks.multi_gpu.common import SHAPES, fill, micro_batches, print_row, rows, settings
from benchmarks.multi_gpu.plan import ppo_values
from benchmarks.shapes import PEAK_FLOPS, flops_per_token
from training import ppo, sft
from training.checkpoint.stage_folder import StageFolder
from training.checkpoint.writer import Saver
from training.config.data import ModelConfig
from training.config.trainers import PPOConfig, PPOPaths
from training.data import demo_model
from training.errors import ConfigError
from training.generation.weight_sync import Resharder
from training.metrics.phase_timer import Phases, highest
from training.models.bloom import table
from training.models.heads import next_token_logprobs
from training.trainer.step import Learner, Objective, build_model, evaluate

STEPS = 3
PRINTED = ("seconds_", "peak_gb_", "tokens_per_second", "rollout_", "reshard_")
"""Beginnings of the names of PPO's metrics that are printed."""


def steps(size: str, layout: dict, folder: Path) -> None:
    """SFT: tokens/s, MFU and memory of full steps on packed rows, then the time to move the weights
    to each generation layout."""
    free_memory()
    config, shape = settings(size, **{"optimizer_precision": PRECISION, **layout}), SHAPES[size]
    began = time.monotonic()
    model = build_model(shape, config, "lm")
    fill(model, shape)
    learner = Learner(model, config, config.lr, 100, 0)
    batch = rows(size, config.global_batch_size, all_tokens=True)
    batches, objective, losses = micro_batches(batch, config), Objective(("loss",), sft.compute), []

    def step():
        losses.append(learner.step(batches, objective)["loss"])

    step()
    first = time.monotonic() - began
    reset_peak()
    seconds = median_seconds(step, 1, STEPS)
    (seconds, peak) = highest([seconds, peak_gb()])
    tokens, ranks = batch["tokens"].numel(), dist.get_world_size()
    print_row(
        part="sft",
        size=size,
        ok=losses[-1] < losses[0],
        tokens_per_second=tokens / seconds,
        step_s=seconds,
        peak_gb=peak,
        first_s=first,
        mfu=step_flops(size, batch) / seconds / ranks / PEAK_FLOPS,
        loss=losses[0],
        losses=[round(loss, 4) for loss in losses],
    )
    learner = batches = step = None
    for generation in (1, 2, 4, 8):
        reshard(size, model, generation)


def warm(size: str, layout: dict, folder: Path) -> None:
    """Fill the compiler's cache on disk with what a timed job will compile: two layers of the
    model's width and a small vocabulary, in micro-batches of the same shape, with gradients and
    without."""
    shape = dataclasses.replace(SHAPES[size], layers=2, vocab=1000)
    config = settings(size, **layout, global_batch_size=layout["micro_batch_size"], optimizer_precision=PRECISION)
    model = build_model(shape, config, "lm")
    fill(model, shape)
    batch = rows(size, config.micro_batch_size, True, config.seq_length)
    batch["tokens"] %= shape.vocab
    if layout["recompute"] == "none":
        evaluate(
            model, batch, config.micro_batch_size, lambda output, micro: next_token_logprobs(output, micro["tokens"])
        )
    loss = Learner(model, config, config.lr, 100, 0).step([batch], Objective(("loss",), sft.compute))["loss"]
    print_row(part="warm", size=size, ok=loss > 0)


def step_flops(size: str, batch: dict) -> float:
    """FLOPs of a step: benchmarks.shapes.flops_per_token with attention within documents only."""
    shape = SHAPES[size]
    owner = batch["documents"] + torch.arange(batch["documents"].size(0))[:, None] * batch["documents"].size(1)
    lengths = owner.flatten().bincount().double()
    attention = 6 * shape.layers * shape.hidden * lengths.square().sum().item()
    return batch["tokens"].numel() * flops_per_token(shape, 0) + attention


def reshard(size: str, model, generation: int) -> None:
    """Seconds to move the weights from the training layout to ``generation`` tensor-parallel ranks,
    and the GB that passed a GPU's links and memory."""
    try:
        resharder = Resharder(model, SHAPES[size], generation)
    except ConfigError:
        return  # the layout's ranks don't divide so
    seconds = []
    for _ in range(3):
        synchronize()
        dist.barrier()
        began = time.monotonic()
        weights = resharder.weights()
        synchronize()
        seconds.append(*highest([time.monotonic() - began]))
        del weights
    received, link, memory = highest([bytes_ / 1e9 for bytes_ in traffic(resharder)])
    print_row(
        part="reshard",
        size=size,
        ok=True,
        generation=generation,
        seconds=statistics.median(seconds[1:]),
        first=seconds[0],
        gb=received,
        link_gb=link,
        memory_gb=memory,
    )


def traffic(resharder: Resharder) -> tuple[float, float, float]:
    """Bytes of this rank: received; through its links, the larger of sent and received of each
    round; read and written in its memory (a copy is twice its size, what is sent is copied and
    read, what is received is written and copied)."""
    element = next(resharder.model.parameters()).element_size()

    def size(move) -> int:
        shape = resharder.shapes[move.name]
        return math.prod(shape) // shape[move.dim] * move.count * element

    sent, received = (
        [sum(size(move) for move in one if getattr(move, side) == resharder.member) for one in resharder.rounds]
        for side in ("of", "to")
    )
    copied = sum(
        size(move) for move in resharder.local_moves if math.prod(resharder.shapes[move.name]) * element != size(move)
    )
    return sum(received), sum(map(max, sent, received)), 2 * copied + 3 * sum(sent) + 3 * sum(received)


def prepared(size: str, layout: dict, folder: Path) -> None:
    """Write the model folder, the prompts, and checkpoints of a random policy and reward model that
    ``phases`` needs."""
    shape = SHAPES[size]
    generator, folder = torch.Generator().manual_seed(5), folder / f"ppo {size}"
    draws = [torch.randint(0, 500, (400,), generator=generator).tolist() for _ in range(512)]
    texts = [" ".join(f"w{number}" for number in numbers) for numbers in draws]
    (folder / "model").mkdir(parents=True)
    demo_model.train_tokenizer(texts, 300).save(str(folder / "model/tokenizer.json"))
    config = table.demo(
        ModelConfig(demo_layers=shape.layers, demo_hidden=shape.hidden, demo_heads=shape.heads, demo_vocab=300)
    )
    (folder / "model/config.json").write_text(json.dumps(config | {"vocab_size": shape.vocab}), encoding="utf-8")
    tokens = {f"{name}_token": text for name, text in demo_model.SPECIAL.items()}
    (folder / "model/tokenizer_config.json").write_text(json.dumps(tokens), encoding="utf-8")
    (folder / "prompts.jsonl").write_text(
        "".join(json.dumps({"prompt": text}) + "\n" for text in texts), encoding="utf-8"
    )
    for stage, head in (("sft", "lm"), ("reward", "scalar")):
        trainer = settings(size, save_every=1)
        model = build_model(shape, trainer, head)
        fill(model, shape)
        weights = SimpleNamespace(
            model=model,
            schedule=SimpleNamespace(num_steps=0),
            optimizer=SimpleNamespace(sharded_state_dict=lambda *_, **__: {}),
        )
        (folder / stage).mkdir()
        Saver(StageFolder(folder / stage), {"model": weights}, trainer).save(1, {"reward_bias": 0.0})
        del model, weights
        gc.collect()
    print_row(part="prepared", size=size, ok=True)


class PrintedPhases(Phases):
    """Prints a line at the end of each phase: the log of a job that was killed shows how far it
    came."""

    @contextlib.contextmanager
    def __call__(self, name: str):
        with super().__call__(name):
            yield
        print(f"{name}: {self.seconds[name]:.2f} s", flush=True)


def phases(size: str, layout: dict, folder: Path) -> None:
    """Iterations of the PPO trainer. The numbers are its own metrics of the third iteration: the
    first compiles and captures, and the second still takes up to a tenth longer."""
    free_memory()
    folder = folder / f"ppo {size}"
    names = ("model", "sft", "prompts.jsonl", "prompts.jsonl", "reward")
    paths = PPOPaths(str(folder / "output"), *(str(folder / name) for name in names))
    config = PPOConfig(
        paths=paths,
        precision=PRECISION,
        optimizer_precision=PRECISION,
        iterations=100,
        warmup_iterations=0,
        **ppo_values(size) | layout,
    )
    ppo.Phases = PrintedPhases
    trainer = ppo.PPO(config)
    for iteration in (1, 2, 3):
        metrics = trainer.iterate(iteration)
        names = [name for name in metrics if name.startswith(PRINTED)]
        seconds = sum(metrics[f"seconds_{phase}"] for phase in ("generate", "score", "update"))
        print_row(
            part="ppo" if iteration == 3 else "ppo warms up",
            size=size,
            ok=abs(metrics["kl"]) < 1 and metrics["skipped_updates"] == 0,
            samples_per_second=config.rollout_batch_size / seconds,
            **{name: metrics[name] for name in (*names, "kl", "policy_loss", "value_loss", "response_length")},
        )
    del trainer
    gc.collect()
