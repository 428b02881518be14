"""PPO on one GPU: time of each phase, memory, samples/s. ``python benchmarks/training/ppo.py
[--models 7b1 1b7] [--offload all] [--out FILE]``

    ours   three iterations of the PPO trainer on random weights: policy and reference the same,
           reward and value model the same
    trl    TRL's PPO trainer (trl.experimental.ppo, the last release that has it is 1.12) on the
           same shape, prompts and lengths: ppo_trl.py
    tail   does scoring gain anything beside a rollout's tail? Decode steps of few rows and forward
           passes, one after the other and at
           once, on two streams
    pin    how long does host memory take to be pinned, and how fast are copies?

Prompts of 512 tokens, responses of 512, EOS ignored (ChatLearn's case at sequence 1024), one epoch.
Each part of each model has a process of its own. Prints JSON lines: an iteration each, with the
seconds of its parts and the metrics that must be sane. Peak memory is torch's, beside
launcher/estimates/memory.py's estimate. ``--small``: tiny shapes, also on a CPU, where numbers mean
nothing.
"""

from __future__ import annotations

import argparse
import gc
import json
import resource
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch

from benchmarks.training.train import CUDA, SHAPES, say
from launcher.estimates import memory
from training import ppo
from training.checkpoint import format
from training.config.shape import Shape
from training.config.trainers import PPOConfig, PPOPaths
from training.distributed import groups
from training.models import lora
from training.optim.offload import Offloaded
from training.rl import reward_bias
from training.rl.minibatches import Plan
from training.trainer.step import Learner

WORDS = 2000
"""Of the tokenizer that the prompts are made with; the model's vocabulary has more rows, which it
samples from."""
PARTS = ("pin", "ours", "trl", "tail")


def folder(shape: Shape, where: Path, prompts: int, length: int) -> None:
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
    vocab = {
        word: number for number, word in enumerate(("<unk>", "<s>", "</s>", "<pad>", *(f"w{i}" for i in range(WORDS))))
    }
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
        (where / f"{name}.json").write_text(json.dumps(content))
    words = torch.randint(min(WORDS, shape.vocab - 4), (prompts, length + 8), generator=generator).tolist()
    rows = [json.dumps({"prompt": " ".join(f"w{number}" for number in row)}) + "\n" for row in words]
    (where / "rlhf.jsonl").write_text("".join(rows))
    (where / "heldout.jsonl").write_text("".join(rows[:2]))


def settings(asked, where: Path) -> PPOConfig:
    paths = PPOPaths(
        str(where / "out"), str(where), "sft", str(where / "rlhf.jsonl"), str(where / "heldout.jsonl"), "reward"
    )
    return PPOConfig(
        paths=paths,
        precision="bf16" if CUDA else "fp32",
        optimizer_precision="bf16" if CUDA else "fp32",
        prompt_length=asked.length,
        response_length=asked.length,
        rollout_batch_size=asked.samples,
        global_batch_size=asked.minibatch,
        generation_batch_size=asked.samples,
        micro_batch_size=asked.rows,
        iterations=asked.iterations + 1,
        warmup_iterations=0,
        offload=asked.offload,
        lora_rank=asked.lora,
        recompute=asked.recompute,
        compile=CUDA,
    )


def random_weights(source: Path, model, fresh_head=None) -> None:
    """In place of a checkpoint's: of "sft" always the same, and of "reward"."""
    generator = torch.Generator(device=groups.device()).manual_seed(1 if source.parts[0] == "sft" else 2)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if lora.ADAPTER_PREFIX not in name:
                weight.normal_(0, 0.02, generator=generator) if weight.dim() > 1 else weight.fill_(
                    float(name.endswith("norm.weight"))
                )
    lora.initialise(model)


class Watch:
    """Seconds of what an iteration does, as the stream that computes sees them: copies beside it
    are free."""

    def __init__(self):
        self.seconds: dict[str, float] = {}

    def around(self, function, name):
        """``function``, its time added to ``name``, or to ``name(self, ...)``."""

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
    """No response ends before its full length, and the reward model's scores stand for
    themselves."""

    def __init__(self, config: PPOConfig):
        super().__init__(config)
        self.tokenizer.eos_id = self.replicas.eos_id = -1

    def learn_from(self, made, scored):
        return super().learn_from(made._replace(ended=torch.ones_like(made.ended)), scored)


def ours(asked) -> None:
    shape = SHAPES[asked.model]
    in_place_of_files = mock.patch.multiple(format, load_weights=random_weights, resolve=lambda *of: Path(of[0]))
    with (
        tempfile.TemporaryDirectory() as name,
        in_place_of_files,
        mock.patch.object(reward_bias, "stored", lambda of: 0.0),
    ):
        folder(shape, Path(name), 4 * asked.samples, asked.length)
        config = settings(asked, Path(name))
        made = memory.estimate(shape, config, 1)
        began = time.monotonic()
        trainer = Trainer(config)
        # or OffloadedModel.model
        models = {id(getattr(model, "model", model)): name for name, model in reversed(vars(trainer.models).items())}
        kept = ("rollout_batch_size", "global_batch_size", "micro_batch_size", "offload", "lora_rank", "recompute")
        say(
            "start",
            {
                "model": asked.model,
                "seconds": time.monotonic() - began,
                "estimate_gb": made.total,
                "host_estimate_gb": sum(gb for _, gb in made.host),
                **{key: getattr(config, key) for key in kept},
            },
        )
        watch = Watch()
        Plan.look = watch.around(Plan.look, lambda plan, model, *_: f"score {models[id(model)]}")
        Learner.step = watch.around(Learner.step, lambda learner, *_: f"train {models[id(learner.model)]}")
        Learner.sleep, Offloaded.wait = watch.around(Learner.sleep, "swap"), watch.around(Offloaded.wait, "swap")
        for iteration in range(1, asked.iterations + 1):
            watch.seconds.clear()
            began = time.monotonic()
            metrics = trainer.iterate(iteration)
            say("iteration", iteration_of(asked, iteration, time.monotonic() - began, watch.seconds, metrics))


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


def iteration_of(asked, iteration: int, seconds: float, parts: dict, metrics: dict) -> dict:
    return {
        "model": asked.model,
        "iteration": iteration,
        "seconds": round(seconds, 2),
        "samples_per_second": round(asked.samples / seconds, 3),
        "offload": asked.offload,
        "parts": {name: round(value, 2) for name, value in parts.items()},
        "host_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, 1),
        **{name: float(f"{metrics[name]:.5g}") for name in SANE},
    }


def tail(asked) -> None:
    """A decode of few rows and scoring passes of as many samples as take about as long."""
    from benchmarks.generation.rollout import requests
    from training.generation.engine import Engine, EngineLimits
    from training.generation.rollout_workers import operations
    from training.generation.weight_sync import named_weights
    from training.models.bloom.decoder import Decoder
    from training.models.heads import next_token_logprobs
    from training.trainer.step import build_model, look

    shape, rows = SHAPES[asked.model], max(asked.samples // 4, 1)
    config = settings(asked, Path("none"))
    model = build_model(shape, config, "lm").requires_grad_(False)
    random_weights(Path("sft"), model)
    weights = {name: weight.detach() for name, weight in named_weights(model).items()}
    decoder = Decoder(shape, weights, operations(groups.device().type))
    engine = Engine(decoder, EngineLimits(2 * asked.length, cache_share=0.5), -1)
    micro = [{"tokens": torch.randint(0, shape.vocab, (asked.rows, 2 * asked.length))} for _ in range(16)]

    def decode():
        return engine.generate(requests(rows, asked.length, [asked.length // 4] * rows, shape.vocab))

    def passes():
        look(model, micro, lambda output, batch: next_token_logprobs(output, batch["tokens"]))

    def timed(*works) -> float:
        """Seconds of the works at once, each in a thread and on a stream of its own (on the CPU:
        one after the other)."""

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

    decode(), passes(), timed(decode), timed(passes)
    alone = timed(decode), timed(passes)
    say(
        "tail",
        {
            "model": asked.model,
            "rows": rows,
            "steps": engine.stats.steps,
            "samples_scored": 16 * asked.rows,
            "decode_s": alone[0],
            "scoring_s": alone[1],
            "both_s": timed(decode, passes),
        },
    )


def pin(asked) -> None:
    size = 8 * 10**9 if CUDA else 10**7
    tensor = torch.ones(size // 4, device=groups.device())
    began = time.monotonic()
    group = Offloaded([tensor])
    pinned = time.monotonic() - began

    def timed(function) -> float:
        if CUDA:
            torch.cuda.synchronize()
        begins = time.monotonic()
        function()
        if CUDA:
            torch.cuda.synchronize()
        return size / (time.monotonic() - begins) / 1e9

    group.wait()
    group.offload()
    into = timed(group.wait)
    group.changed = True
    out = timed(group.offload)
    other = Offloaded([torch.ones(size // 4, device=groups.device())])
    group.wait()
    group.changed = True
    both = timed(lambda: group.offload(other))
    say(
        "pin",
        {
            "gb": size / 1e9,
            "pin_s": pinned,
            "to_device_gb_per_s": into,
            "to_host_gb_per_s": out,
            "each_way_at_once_gb_per_s": both,
        },
    )


def one(asked) -> None:
    if asked.parts == ["trl"]:
        from benchmarks.training import ppo_trl

        ppo_trl.run(asked, SHAPES[asked.model])
        return
    with groups.ranks(1, 1, 1):
        {"ours": ours, "tail": tail, "pin": pin}[asked.parts[0]](asked)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=["7b1", "1b7"])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=["ours"])
    parser.add_argument("--offload", choices=("none", "frozen", "all"), default="all")
    parser.add_argument("--lora", type=int, default=0, help="rank of adapters; 0 = all weights learn")
    parser.add_argument("--recompute", default="none")
    parser.add_argument("--samples", type=int, default=192, help="an iteration")
    parser.add_argument("--minibatch", type=int, default=64, help="samples of an optimizer step")
    parser.add_argument("--rows", type=int, default=4, help="of a forward and backward pass")
    parser.add_argument("--length", type=int, default=512, help="of prompts, and of responses")
    parser.add_argument("--iterations", type=int, default=3)
    parser.add_argument("--limit", type=int, default=600, help="most seconds of a part")
    parser.add_argument("--out", type=Path, help="JSON lines are added to this file")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--one", action="store_true", help="the one part of the one model in this process")
    asked = parser.parse_args()
    if asked.out:
        asked.out.touch()  # a folder that is missing is said before the first part's minutes
    if asked.small:
        asked.models, asked.samples, asked.minibatch, asked.rows, asked.length = ["small"], 8, 4, 2, 12
    if asked.one:
        asked.model = asked.models[0]
        one(asked)
        gc.collect()
        return 0
    options = [
        word
        for name in ("offload", "lora", "recompute", "samples", "minibatch", "rows", "length", "iterations")
        for word in (f"--{name}", str(getattr(asked, name)))
    ]
    return max(
        _process(asked, ["--one", *(["--small"] if asked.small else []), "--models", model, "--parts", part, *options])
        for model in asked.models
        for part in asked.parts
    )


def _process(asked, arguments: list[str]) -> int:
    """Run one part, its JSON lines to the screen and the file -> 1 where it failed."""
    with subprocess.Popen([sys.executable, __file__, *arguments], stdout=subprocess.PIPE, text=True) as process:
        alarm = threading.Timer(asked.limit, process.kill)
        alarm.daemon = True  # an interrupt ends this process, too
        alarm.start()
        for line in process.stdout:
            print(line, end="", flush=True)
            if asked.out and line.startswith("{"):
                with open(asked.out, "a", encoding="utf-8") as file:
                    file.write(line)
        alarm.cancel()
    if process.returncode:
        print(f"failed: {' '.join(arguments)}: exit code {process.returncode}", flush=True)
    return int(process.returncode != 0)


if __name__ == "__main__":
    sys.exit(main())
