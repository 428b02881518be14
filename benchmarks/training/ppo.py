"""PPO on one GPU: time of each phase, memory, samples/s. ``python benchmarks/training/ppo.py
[--models 7b1 1b7] [--offload all] [--out FILE]``

    ours   three iterations of the PPO trainer on random weights: policy and reference are the
           same, reward and value model, too
    trl    TRL's PPO trainer (trl.experimental.ppo, the last release that has it is 1.12) on the
           same shape, prompts and lengths: ppo_trl.py
    tail   does scoring gain anything while a rollout's tail runs? Decode steps of few rows and
           forward passes, one after the other and at once, on two streams
    pin    how long does pinning host memory take, and how fast are copies?

Prompts of 512 tokens, responses of 512, EOS ignored (ChatLearn's case at sequence 1024), one epoch.
Each part of each model has a process of its own. Prints JSON lines: an iteration each, with the
seconds of its parts and the metrics that must be sane. Peak memory is torch's;
launcher/estimates/memory.py's estimate of it stands in the first line. ``--small``: tiny shapes,
also on a CPU, where the numbers mean nothing.
"""

from __future__ import annotations

import argparse
import gc
import json
import resource
import sys
import tempfile
import threading
import time
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch

from benchmarks.common import print_row, run_part
from benchmarks.device import CUDA, PRECISION, seconds_of
from benchmarks.inputs import random_weights
from benchmarks.shapes import SHAPES
from launcher.estimates import memory
from training import ppo
from training.checkpoint import format
from training.checkpoint.stage_folder import StageFolder
from training.config.shape import Shape
from training.config.trainers import PPOConfig, PPOPaths
from training.distributed import groups
from training.models import lora
from training.optim.offload import Offloaded
from training.rl import reward_bias
from training.rl.minibatches import Plan
from training.trainer.step import Learner

TOKENIZER_WORDS = 2000
"""Words of the prompts' tokenizer. The model samples from all rows of its larger vocabulary."""
MODELS = ("560m", "1b7", "3b", "7b1", "small")
PARTS = ("pin", "ours", "trl", "tail")


def write_inputs(shape: Shape, folder: Path, prompts: int, length: int) -> None:
    """A model's config.json, a tokenizer of words, and rows of prompts longer than ``length``."""
    generator = torch.Generator().manual_seed(3)
    config = {
        "model_type": "bloom",
        "n_layer": shape.layers,
        "hidden_size": shape.hidden,
        "n_head": shape.heads,
        "vocab_size": shape.vocab,
        "layer_norm_epsilon": shape.norm_eps,
    }
    tokens = ("<unk>", "<s>", "</s>", "<pad>", *(f"w{number}" for number in range(TOKENIZER_WORDS)))
    vocab = {token: number for number, token in enumerate(tokens)}
    tokenizer = {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "<unk>"},
    }
    for name, content in (
        ("config", config),
        ("tokenizer", tokenizer),
        ("tokenizer_config", {"eos_token": "</s>", "pad_token": "<pad>"}),
    ):
        (folder / f"{name}.json").write_text(json.dumps(content))
    numbers = torch.randint(min(TOKENIZER_WORDS, shape.vocab - 4), (prompts, length + 8), generator=generator)
    rows = [json.dumps({"prompt": " ".join(f"w{number}" for number in row)}) + "\n" for row in numbers.tolist()]
    (folder / "rlhf.jsonl").write_text("".join(rows))
    (folder / "heldout.jsonl").write_text("".join(rows[:2]))


def settings(options: argparse.Namespace, folder: Path) -> PPOConfig:
    prompts = str(folder / "rlhf.jsonl"), str(folder / "heldout.jsonl")
    paths = PPOPaths(str(folder / "out"), str(folder), "sft", *prompts, "reward")
    return PPOConfig(
        paths=paths,
        precision=PRECISION,
        optimizer_precision=PRECISION,
        prompt_length=options.length,
        response_length=options.length,
        rollout_batch_size=options.samples,
        global_batch_size=options.minibatch,
        generation_batch_size=options.samples,
        micro_batch_size=options.rows,
        iterations=options.iterations + 1,
        warmup_iterations=0,
        offload=options.offload,
        lora_rank=options.lora,
        recompute=options.recompute,
        compile=CUDA,
    )


def load_random_weights(source: Path, model, fresh_head=None) -> None:
    """In place of loading a checkpoint: "sft" has one seed, "reward" another."""
    random_weights(model, seed=1 if source.parts[0] == "sft" else 2)
    lora.initialise(model)


class Stopwatch:
    """Seconds of an iteration's parts, as the computing stream sees them: copies that run at the
    same time cost nothing."""

    def __init__(self):
        self.seconds: dict[str, float] = {}

    def around(self, function, name):
        """``function`` with its time added to ``name``, or to ``name(self, ...)``."""

        def timed(*args, **kwargs):
            self._wait()
            began = time.monotonic()
            result = function(*args, **kwargs)
            self._wait()
            key = name if isinstance(name, str) else name(*args)
            self.seconds[key] = self.seconds.get(key, 0.0) + time.monotonic() - began
            return result

        return timed

    def _wait(self) -> None:
        if CUDA:
            torch.cuda.current_stream().synchronize()


class Trainer(ppo.PPO):
    """Every response has its full length, and the reward model's scores are used as they are."""

    def __init__(self, config: PPOConfig):
        super().__init__(config)
        self.replicas.stop_ids = ()

    def learn_from(self, rollout, scored):
        return super().learn_from(rollout._replace(ended=torch.ones_like(rollout.ended)), scored)


def iterations(options: argparse.Namespace) -> None:
    """Iterations of the PPO trainer; a row for the start, and one for each iteration."""
    shape = SHAPES[options.model]
    with (
        tempfile.TemporaryDirectory() as name,
        mock.patch.object(format, "load_weights", load_random_weights),
        mock.patch.object(StageFolder, "resolve", lambda stage, iteration=0: stage.path),
        mock.patch.object(reward_bias, "stored", lambda of: 0.0),
    ):
        folder = Path(name)
        write_inputs(shape, folder, 4 * options.samples, options.length)
        config = settings(options, folder)
        estimate = memory.estimate(shape, config, 1)
        began = time.monotonic()
        trainer = Trainer(config)
        print_row(
            part="start",
            model=options.model,
            seconds=time.monotonic() - began,
            estimate_gb=estimate.total,
            host_estimate_gb=sum(gb for _, gb in estimate.host),
            **{key: getattr(config, key) for key in SETTINGS},
        )
        stopwatch = timed_parts(trainer)
        for iteration in range(1, options.iterations + 1):
            stopwatch.seconds.clear()
            began = time.monotonic()
            metrics = trainer.iterate(iteration)
            seconds = time.monotonic() - began
            print_row(part="iteration", **iteration_row(options, iteration, seconds, stopwatch.seconds, metrics))


def timed_parts(trainer: Trainer) -> Stopwatch:
    """A stopwatch around the trainer's scoring, updates and copies."""
    # a model may be parked: then .model is the model itself
    names = {id(getattr(model, "model", model)): name for name, model in reversed(vars(trainer.models).items())}
    stopwatch = Stopwatch()
    Plan.look = stopwatch.around(Plan.look, lambda plan, model, *_: f"score {names[id(model)]}")
    Learner.step = stopwatch.around(Learner.step, lambda learner, *_: f"train {names[id(learner.model)]}")
    Learner.sleep = stopwatch.around(Learner.sleep, "swap")
    Offloaded.wait = stopwatch.around(Offloaded.wait, "swap")
    return stopwatch


SETTINGS = ("rollout_batch_size", "global_batch_size", "micro_batch_size", "offload", "lora_rank", "recompute")
SANE = (
    "reward",
    "kl",
    "entropy",
    "policy_loss",
    "value_loss",
    "approx_kl",
    "clip_fraction",
    "grad_norm",
    "value_grad_norm",
    "explained_variance",
    "response_length",
    "skipped_updates",
    "rollout_tokens_per_second",
    "seconds_prefill",
    "cache_gb",
    "preemptions",
    "rollout_tail_share",
    "seconds_generate",
    "seconds_score",
    "seconds_update",
    "peak_gb_generate",
    "peak_gb_score",
    "peak_gb_update",
)


def iteration_row(
    options: argparse.Namespace, iteration: int, seconds: float, parts: dict[str, float], metrics: dict
) -> dict:
    return {
        "model": options.model,
        "iteration": iteration,
        "seconds": round(seconds, 2),
        "samples_per_second": round(options.samples / seconds, 3),
        "offload": options.offload,
        "parts": {name: round(value, 2) for name, value in parts.items()},
        "host_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, 1),
        **{name: metrics[name] for name in SANE},
    }


def tail(options: argparse.Namespace) -> None:
    """A decode of few rows, and scoring passes of as many samples as take about as long."""
    from benchmarks.generation.rollout import requests
    from training.generation.engine import Engine, EngineLimits
    from training.generation.rollout_workers import operations
    from training.generation.weight_sync import named_weights
    from training.models.bloom.decoder import Decoder
    from training.models.heads import next_token_logprobs
    from training.trainer.step import build_model, look

    shape, rows, length = SHAPES[options.model], max(options.samples // 4, 1), options.length
    model = build_model(shape, settings(options, Path("none")), "lm").requires_grad_(False)
    random_weights(model, seed=1)
    weights = {name: weight.detach() for name, weight in named_weights(model).items()}
    decoder = Decoder(shape, weights, operations(groups.device().type))
    engine = Engine(decoder, EngineLimits(2 * length, cache_share=0.5), -1)
    micro = [{"tokens": torch.randint(0, shape.vocab, (options.rows, 2 * length))} for _ in range(16)]

    def decode():
        return engine.generate(requests(rows, length, [length // 4] * rows, shape.vocab))

    def passes():
        look(model, micro, lambda output, batch: next_token_logprobs(output, batch["tokens"]))

    decode(), passes(), seconds_at_once(decode), seconds_at_once(passes)
    print_row(
        part="tail",
        model=options.model,
        rows=rows,
        decode_s=seconds_at_once(decode),
        scoring_s=seconds_at_once(passes),
        steps=engine.stats.steps,
        samples_scored=16 * options.rows,
        both_s=seconds_at_once(decode, passes),
    )


def seconds_at_once(*works) -> float:
    """Seconds of the works at once, each in a thread and on a stream of its own. On the CPU they
    run one after the other."""

    def run(work):
        torch.cuda.set_device(0)
        with torch.cuda.stream(torch.cuda.Stream()):
            work()
            torch.cuda.current_stream().synchronize()

    threads = [threading.Thread(target=run, args=(work,)) for work in works]
    began = time.monotonic()
    for thread, work in zip(threads, works, strict=True):
        thread.start() if CUDA else work()
    for thread in threads if CUDA else ():
        thread.join()
    return time.monotonic() - began


def pin(options: argparse.Namespace) -> None:
    """Seconds to pin host memory, and GB/s of copies."""
    size = 8 * 10**9 if CUDA else 10**7
    tensor = torch.ones(size // 4, device=groups.device())
    began = time.monotonic()
    group = Offloaded([tensor])
    pin_s = time.monotonic() - began

    def gb_per_s(function) -> float:
        return size / seconds_of(function) / 1e9

    group.wait()
    group.offload()
    to_device = gb_per_s(group.wait)
    group.changed = True
    to_host = gb_per_s(group.offload)
    other = Offloaded([torch.ones(size // 4, device=groups.device())])
    group.wait()
    group.changed = True
    print_row(
        part="pin",
        gb=size / 1e9,
        pin_s=pin_s,
        to_device_gb_per_s=to_device,
        to_host_gb_per_s=to_host,
        each_way_at_once_gb_per_s=gb_per_s(lambda: group.offload(other)),
    )


def run_one(options: argparse.Namespace) -> None:
    """The one part of the one model, in this process."""
    if options.parts == ["trl"]:
        from benchmarks.training import ppo_trl

        ppo_trl.run(options, SHAPES[options.model])
        return
    with groups.ranks(1, 1, 1):
        {"ours": iterations, "tail": tail, "pin": pin}[options.parts[0]](options)


def main() -> int:
    options = parse_arguments()
    if options.out:
        options.out.touch()  # a missing folder is an error before the first part's minutes
    if options.small:
        options.models, options.samples, options.minibatch, options.rows, options.length = ["small"], 8, 4, 2, 12
    if options.one:
        options.model = options.models[0]
        run_one(options)
        gc.collect()
        return 0
    passed_on = ("offload", "lora", "recompute", "samples", "minibatch", "rows", "length", "iterations")
    same = [argument for name in passed_on for argument in (f"--{name}", str(getattr(options, name)))]
    same += ["--one", *(["--small"] if options.small else [])]
    failed = []
    for model in options.models:
        for part in options.parts:
            _, code = run_part(__file__, [*same, "--models", model, "--parts", part], options.limit, options.out)
            if code:
                failed.append((model, part))
                print(f"failed: {part} of {model}: exit code {code}", flush=True)
    return int(bool(failed))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["7b1", "1b7"])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=["ours"])
    parser.add_argument("--offload", choices=("none", "frozen", "all"), default="all")
    parser.add_argument("--lora", type=int, default=0, help="rank of adapters; 0 = all weights learn")
    parser.add_argument("--recompute", default="none")
    parser.add_argument("--samples", type=int, default=192, help="of an iteration")
    parser.add_argument("--minibatch", type=int, default=64, help="samples of an optimizer step")
    parser.add_argument("--rows", type=int, default=4, help="of a forward and backward pass")
    parser.add_argument("--length", type=int, default=512, help="of prompts, and of responses")
    parser.add_argument("--iterations", type=int, default=3)
    parser.add_argument("--limit", type=int, default=600, help="most seconds of a part")
    parser.add_argument("--out", type=Path, help="JSON lines are added to this file")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--one", action="store_true", help="the one part of the one model in this process")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
