"""The parts of benchmarks/multi_gpu/suite.py that time: SFT steps, weights moved to another layout,
PPO's phases."""

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

from benchmarks.multi_gpu.common import SHAPES, fill, micro_batches, rows, say, settings
from benchmarks.multi_gpu.plan import ppo_values
from benchmarks.training.train import CUDA, PEAK, clean, flops, peak_gb, sync, timed
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


def steps(size: str, layout: dict, folder: Path) -> None:
    """SFT: tokens/s, MFU and memory of full steps on packed rows, then the weights' way to each
    generation layout."""
    clean()
    values = {"optimizer_precision": "bf16" if CUDA else "fp32", **layout}
    config, shape = settings(size, **values), SHAPES[size]
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
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
    seconds = timed(step, 1, STEPS)
    (seconds, peak) = highest([seconds, peak_gb()])
    tokens, ranks = batch["tokens"].numel(), dist.get_world_size()
    say(
        part="sft",
        size=size,
        ok=losses[-1] < losses[0],
        tokens_per_second=tokens / seconds,
        step_s=seconds,
        peak_gb=peak,
        first_s=first,
        mfu=work(size, batch) / seconds / ranks / PEAK,
        loss=losses[0],
        losses=[round(loss, 4) for loss in losses],
    )
    learner = batches = step = None
    for generation in (1, 2, 4, 8):
        reshard(size, model, generation)


def warm(size: str, layout: dict, folder: Path) -> None:
    """Compile, into the compiler's cache on disk, what a timed job will: two layers of the model's
    width and few tokens to choose from, in micro-batches of the same shape, with gradients and
    without."""
    shape = dataclasses.replace(SHAPES[size], layers=2, vocab=1000)
    config = settings(
        size, **layout, global_batch_size=layout["micro_batch_size"], optimizer_precision="bf16" if CUDA else "fp32"
    )
    model = build_model(shape, config, "lm")
    fill(model, shape)
    batch = rows(size, config.micro_batch_size, True, config.seq_length)
    batch["tokens"] %= shape.vocab
    if layout["recompute"] == "none":
        evaluate(
            model, batch, config.micro_batch_size, lambda output, micro: next_token_logprobs(output, micro["tokens"])
        )
    loss = Learner(model, config, config.lr, 100, 0).step([batch], Objective(("loss",), sft.compute))["loss"]
    say(part="warm", size=size, ok=loss > 0)


def work(size: str, batch: dict) -> float:
    """FLOPs of a step: benchmarks.training.train.flops with attention within documents only."""
    owner = batch["documents"] + torch.arange(batch["documents"].size(0))[:, None] * batch["documents"].size(1)
    lengths = owner.flatten().bincount().double()
    tokens = batch["tokens"].numel()
    return (
        tokens * flops(SHAPES[size], 0) + 6 * SHAPES[size].layers * SHAPES[size].hidden * lengths.square().sum().item()
    )


def reshard(size: str, model, generation: int) -> None:
    """Seconds from the training layout to ``generation`` tensor-parallel ranks, and what passed a
    GPU's links and memory."""
    try:
        resharder = Resharder(model, SHAPES[size], generation)
    except ConfigError:
        return  # the layout's ranks don't divide so
    seconds = []
    for _ in range(3):
        sync()
        dist.barrier()
        began = time.monotonic()
        weights = resharder.weights()
        sync()
        seconds.append(*highest([time.monotonic() - began]))
        del weights
    received, link, memory = highest([bytes_ / 1e9 for bytes_ in traffic(resharder)])
    say(
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
    """Model folder, prompts, and checkpoints of a random policy and reward model, for
    ``phases``."""
    shape = SHAPES[size]
    words = [f"w{number}" for number in range(500)]
    generator, folder = torch.Generator().manual_seed(5), folder / f"ppo {size}"
    texts = [
        " ".join(words[number] for number in torch.randint(0, 500, (400,), generator=generator)) for _ in range(512)
    ]
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
    say(part="prepared", size=size, ok=True)


class ToldPhases(Phases):
    """Says when each phase has ended: a job that is cut off has then told how far it came."""

    @contextlib.contextmanager
    def __call__(self, name: str):
        with super().__call__(name):
            yield
        print(f"{name}: {self.seconds[name]:.2f} s", flush=True)


def phases(size: str, layout: dict, folder: Path) -> None:
    """PPO by the trainer itself; the numbers are its own metrics, of the third iteration: the first
    compiles and captures, the second still takes up to a tenth longer."""
    clean()
    folder = folder / f"ppo {size}"
    names = ("model", "sft", "prompts.jsonl", "prompts.jsonl", "reward")
    paths = PPOPaths(str(folder / "output"), *(str(folder / name) for name in names))
    config = PPOConfig(
        paths=paths,
        precision="bf16" if CUDA else "fp32",
        optimizer_precision="bf16" if CUDA else "fp32",
        iterations=100,
        warmup_iterations=0,
        **ppo_values(size) | layout,
    )
    ppo.Phases = ToldPhases
    trainer = ppo.PPO(config)
    for iteration in (1, 2, 3):
        made = trainer.iterate(iteration)
        wanted = [
            name
            for name in made
            if name.startswith(("seconds_", "peak_gb_", "tokens_per_second", "rollout_", "reshard_"))
        ]
        samples = config.rollout_batch_size / sum(made[f"seconds_{phase}"] for phase in ("generate", "score", "update"))
        say(
            part="ppo" if iteration == 3 else "ppo warms up",
            size=size,
            ok=abs(made["kl"]) < 1 and made["skipped_updates"] == 0,
            samples_per_second=samples,
            **{name: made[name] for name in (*wanted, "kl", "policy_loss", "value_loss", "response_length")},
        )
    del trainer
    gc.collect()
