"""What can 2,312 real pairs teach a model that knows nothing? ``python
benchmarks/learning/learns_hh.py HH_FILE [--tiny] [--set KEY=VALUE ...]``.

The whole chain by the real command line on Anthropic's harmless-base test split. The model has
bloom-560m's shape (24 layers, hidden 1024, 250,880 rows), random weights, and a byte-level BPE
trained on the split's own training prompts and replies. The script prints

- the held-out SFT loss against the unigram entropy;
- the reward model's held-out accuracy against its floors: "the shorter reply wins" on the same
  pairs, and .623 of TF-IDF with a logistic regression (rlhf.md section 3, on another split);
- PPO's curve.

Run folder and report stay. ``--tiny``: two layers and a few steps, to try the script on a CPU.
``--until``: a part of the chain; the same command without it continues.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.learning.launch import for_stages, metric, one_gpu_each, settings_text, submit
from training.config.data import DataConfig, ModelConfig
from training.data import demo_model, sorting

RUNS, MODELS = Path("runs"), Path("models")
SHAPE = ModelConfig(demo_layers=24, demo_hidden=1024, demo_heads=16, demo_vocab=16_384)
TINY = ModelConfig(demo_layers=2, demo_hidden=64, demo_heads=4, demo_vocab=4_096)
ROWS = 250_880
"""Rows of BLOOM's embedding: the tokenizer fills the first ``demo_vocab`` of them, as BLOOM's own
leaves the last 200 unused."""
TRAINERS = ("sft", "reward", "rlhf")
SETTINGS = {
    # A run this short gains nothing from compiling (a minute a stage), nor from checkpoints of 18
    # bytes a parameter, which are hashed several times.
    **for_stages(TRAINERS, attention="sdpa", optimizer_precision="bf16"),
    **one_gpu_each(TRAINERS),
    "sft.seq_length": 1024,
    "sft.micro_batch_size": 16,
    "sft.global_batch_size": 64,
    "sft.lr": 3e-4,
    "sft.warmup_iterations": 20,
    "sft.iterations": 100,
    "sft.eval_every": 20,
    "sft.save_every": 100,
    "sft.log_every": 20,
    "sft.sample_every": 0,
    "reward.seq_length": 1024,
    "reward.micro_batch_size": 8,
    "reward.global_batch_size": 32,
    "reward.lr": 2e-5,
    "reward.warmup_iterations": 10,
    "reward.iterations": 60,
    "reward.eval_every": 20,
    "reward.save_every": 60,
    "reward.log_every": 20,
    "reward.calibration_length": 96,
    "rlhf.prompt_length": 512,
    "rlhf.response_length": 96,
    "rlhf.rollout_batch_size": 128,
    "rlhf.global_batch_size": 64,
    "rlhf.micro_batch_tokens": 16384,
    "rlhf.iterations": 20,
    "rlhf.lr": 2e-6,
    "rlhf.value_lr": 1e-5,
    "rlhf.warmup_iterations": 2,
    "rlhf.kl_coef": 0.05,
    "rlhf.eval_every": 10,
    "rlhf.save_every": 20,
    "rlhf.log_every": 5,
    "export.dtype": "bf16",
    "mtbench.max_new_tokens": 96,
    "mtbench.heldout_max_new_tokens": 96,
    "mtbench.context_length": 1024,
    "mtbench.batch_size": 128,
    "data.heldout": 0.22,
    "data.heldout_max": 512,
}
TINY_SETTINGS = {
    **for_stages(TRAINERS, precision="fp32", optimizer_precision="fp32"),
    "sft.iterations": 4,
    "reward.iterations": 2,
    "rlhf.iterations": 2,
    "sft.warmup_iterations": 1,
    "reward.warmup_iterations": 1,
    "rlhf.warmup_iterations": 0,
    "sft.save_every": 4,
    "reward.save_every": 2,
    "rlhf.save_every": 2,
    "sft.seq_length": 128,
    "reward.seq_length": 128,
    "rlhf.prompt_length": 64,
    "rlhf.response_length": 8,
    "rlhf.rollout_batch_size": 16,
    "rlhf.global_batch_size": 16,
    "mtbench.max_new_tokens": 4,
    "mtbench.heldout_max_new_tokens": 4,
    "mtbench.context_length": 128,
    "data.heldout_max": 8,
}


def make_model(folder: Path, source: str, shape: ModelConfig, data: DataConfig, rows: int = ROWS) -> None:
    """Write a Hugging Face folder with random weights and a tokenizer trained on the training rows
    of ``source``. An existing folder stays as it is."""
    if folder.exists():
        return
    unfinished = folder.with_name(f"{folder.name}.writing")
    unfinished.mkdir(parents=True, exist_ok=True)
    with sorting.Writer(folder.with_name(f"{folder.name}.data")) as writer:
        sorting.from_source(data, writer)
        texts = (row["prompt"] + row["response"] for row in writer.rows("sft.jsonl"))
        demo_model.write(unfinished, texts, shape, data.seed, rows=rows)
    unfinished.rename(folder)


def table(run: Path) -> str:
    """The results as a Markdown table."""
    losses, entropy = metric(run, "sft", "heldout_loss"), metric(run, "sft", "unigram_entropy")[-1][1]
    accuracy, low, high = (metric(run, "reward", f"heldout_accuracy{end}")[-1][1] for end in ("", "_low", "_high"))
    at, best = min(losses, key=lambda pair: pair[1])
    lines = [
        "| | |",
        "|---|---|",
        f"| SFT held-out loss, nats a token: first, best ({at} iterations), last | {losses[0][1]:.3f}, {best:.3f}, "
        f"{losses[-1][1]:.3f} |",
        f"| unigram entropy of the held-out replies | {entropy:.3f} |",
        f"| reward model, held-out accuracy | {accuracy:.3f} [{low:.3f}, {high:.3f}] |",
        f'| floor: "the shorter reply wins", same pairs | {metric(run, "reward", "shorter_wins")[-1][1]:.3f} |',
    ]
    for name in ("reward", "kl", "entropy", "eos_rate", "response_length", "heldout_reward", "heldout_kl"):
        values = metric(run, "rlhf", name)
        lines.append(
            f"| PPO {name}: first, last of {values[-1][0]} iterations | {values[0][1]:.3f}, {values[-1][1]:.3f} |"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="Anthropic's harmless-base.test.jsonl.gz")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--name", default="hh")
    parser.add_argument("--profile", default="h200")
    parser.add_argument("--until", default="mtbench", metavar="STAGE")
    parser.add_argument("--set", dest="sets", action="append", default=[], metavar="KEY=VALUE")
    options = parser.parse_args()
    settings = {**SETTINGS, **(TINY_SETTINGS if options.tiny else {})}
    model = MODELS / options.name
    data = DataConfig(source=options.source, heldout=settings["data.heldout"], heldout_max=settings["data.heldout_max"])
    make_model(model, options.source, TINY if options.tiny else SHAPE, data)
    sets = settings_text(settings | {"model.checkpoint": model, "data.source": options.source})
    command = submit("bloom-560m", options.profile, options.name, [*sets, *options.sets], "--until", options.until)
    subprocess.run(command, check=True)
    if options.until == "mtbench":
        print(table(RUNS / options.name))
    return 0


if __name__ == "__main__":
    sys.exit(main())
