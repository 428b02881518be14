"""Does the demo learn? The whole chain over several seeds, and its thresholds: ``python
benchmarks/learning/learns.py [ppo|dpo|grpo] [seed ...]``.

A seed sets data, model initialisation, data order and sampling. Each seed's line has

- the held-out SFT loss, and the unigram entropy of the held-out responses;
- the reward model's held-out accuracy with its 95% interval (DPO: of its implicit rewards);
- the gold score (computed from the text, 0..1) of replies sampled at temperature 1 to 256 held-out
  prompts, of the SFT model and of the trained policy;
- their paired difference with its 95% bootstrap interval, and KL(policy || SFT) per response.

Exits 1 where a threshold is missed. About 5 minutes a seed on two cores.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.learning.launch import for_stages, metric, settings_text, submit

RUNS = Path("runs")
STAGES = {"ppo": ("reward", "rlhf"), "grpo": ("reward", "grpo"), "dpo": ("dpo", "dpo")}
"""Pipeline -> stages with the preferences' accuracy and with the trained policy."""
HEAD = (
    "| seed | SFT held-out loss | unigram entropy | preference accuracy | gold SFT | gold policy | difference | KL |\n"
    "|---|---|---|---|---|---|---|---|"
)


def chain(pipeline: str, seed: int) -> Path:
    """Run the chain for a seed, or continue it; its run folder. Raises CalledProcessError where a
    stage failed."""
    name = f"bloom-tiny-{pipeline}-seed-{seed}"
    settings = for_stages(sorted({"data", "sft", *STAGES[pipeline], "mtbench"}), seed=seed)
    command = submit("bloom-tiny", "local", name, settings_text(settings), "--pipeline", pipeline)
    subprocess.run(command, check=True)
    return RUNS / name


def last(run: Path, stage: str, name: str) -> float:
    """The last value of a metric of a stage."""
    return metric(run, stage, name)[-1][1]


def row(pipeline: str, seed: int, run: Path) -> tuple[str, bool]:
    """One line of the table, and whether all thresholds are met."""
    preference, policy = STAGES[pipeline]
    loss, entropy = last(run, "sft", "heldout_loss"), last(run, "sft", "unigram_entropy")
    accuracy, low, high = (last(run, preference, f"heldout_accuracy{end}") for end in ("", "_low", "_high"))
    heldout = json.loads((run / "mtbench" / "results.json").read_text(encoding="utf-8"))["heldout"]
    gold, gain, kl = heldout["gold"], heldout["gold_difference"][policy], heldout["kl"][policy]
    line = (
        f"| {seed} | {loss:.3f} | {entropy:.2f} | {accuracy:.3f} [{low:.3f}, {high:.3f}] "
        f"| {gold['sft']['mean']:.3f} | {gold[policy]['mean']:.3f} | {gain['mean']:+.3f} "
        f"[{gain['low']:+.3f}, {gain['high']:+.3f}] | {kl['mean']:.2f} |"
    )
    return line, loss < entropy / 2 and (accuracy >= 0.9 if preference == "reward" else low > 0.5) and gain["low"] > 0


def main(arguments: list[str]) -> int:
    pipeline = arguments.pop(0) if arguments and arguments[0] in STAGES else "ppo"
    seeds = [int(argument) for argument in arguments] or [0, 1, 2]
    results = [row(pipeline, seed, chain(pipeline, seed)) for seed in seeds]
    print(HEAD, *(line for line, _ in results), sep="\n")
    return 0 if all(met for _, met in results) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
