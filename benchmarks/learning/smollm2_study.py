"""The works of benchmarks/learning/learns_smollm2.py: the command of each run, export, evaluation
and rescoring, and which work needs which."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from benchmarks.learning import launch, smollm2_inputs, smollm2_result
from benchmarks.learning.side_by_side import Unfinished, Work
from benchmarks.learning.smollm2_settings import BRANCHES, HELDOUT, PIPELINES, STOP, TEMPLATE
from conversion.config import FOLDERS
from eval.files.jsonl import dump, read
from eval.scores import reward_model


def up_to_date(target: Path, *sources: Path) -> bool:
    """Whether ``target`` exists and no existing source is newer. A folder is as old as its newest
    file."""
    return target.exists() and all(last_change(target) >= last_change(source) for source in sources if source.exists())


def last_change(path: Path) -> float:
    """When a file, or anything directly in a folder, changed last."""
    return max(each.stat().st_mtime for each in (path, *(path.iterdir() if path.is_dir() else ())))


class Study:
    """The commands of all runs below ``folder``.

    ``sources``: file of rows by name ("base", "judge", "full"). ``settings``: key -> value for all
    runs. ``evaluation``: option -> value of ``python -m eval.mtbench``.
    """

    def __init__(
        self, folder: Path, sources: dict[str, Path], model: Path, settings: dict, evaluation: dict, questions: str
    ):
        self.folder, self.sources, self.model, self.settings = folder, sources, model, settings
        self.evaluation, self.questions, self.exported = evaluation, questions, folder / "exported"

    def submit(
        self, name: str, until: str, pipeline: str = "ppo", source: str = "base", changes: dict | None = None
    ) -> list[str]:
        """The launcher's command of a run. Every run but base reuses the stages that it has in
        common with base."""
        sections = (*PIPELINES[pipeline], "data", "model", "convert", "export")
        values = {
            "data.heldout": HELDOUT,
            "data.source": self.sources[source],
            "model.checkpoint": self.model,
            **self.settings,
            **(changes or {}),
        }
        used = {key: value for key, value in values.items() if smollm2_inputs.section_of(key) in sections}
        reuse = [] if name == "base" else ["--reuse", str(self.folder / "base")]
        options = ["--runs", str(self.folder), "--pipeline", pipeline, "--until", until, *reuse]
        return launch.submit(smollm2_inputs.RECIPE, "local", name, launch.settings_text(used), *options)

    def stage(self, name: str) -> Path:
        """Where the branch's policy is trained."""
        return self.folder / name / PIPELINES[BRANCHES[name][0]][-1]

    def require_checkpoint(self, name: str) -> None:
        """Raises Unfinished where the branch ended before its first checkpoint."""
        if not (self.stage(name) / "latest").exists():
            raise Unfinished("it ended before its first checkpoint")

    def export(self, run: str, stage: str, name: str) -> list[str] | None:
        """The export of a stage's last checkpoint, whether its training reached the end or not;
        None where the export is up to date."""
        folder, target = self.folder / run / stage, self.exported / name
        if up_to_date(target, folder / "latest"):
            return None
        checkpoint = folder / f"checkpoints/iter_{int((folder / 'latest').read_text()):07d}/{FOLDERS[stage]}"
        paths = [str(checkpoint), str(target), "--model", str(self.model)]
        return [sys.executable, "-m", "conversion.megatron_to_hf", *paths, "--overwrite"]

    def evaluate(self, output: str, names: list[str], judged: bool = True) -> list[str] | None:
        """The evaluation's command for the SFT model and the branches ``names``; None where it is
        up to date. It generates only what no other evaluation has."""
        target, others = self.folder / "evaluation" / output, [name for name in ("sft", *names) if name != output]
        results = [self.folder / "evaluation" / name / "results.json" for name in others]
        exported = [self.exported / name for name in ("sft", *names, *(["judge"] if judged else []))]
        if up_to_date(target / "results.json", *results, *exported):
            return None
        for name in others:
            self.share_replies(output, name)
        models = [f"{name}={self.exported / name}" for name in ("sft", *names)]
        options = {
            "heldout": self.folder / "base" / "data" / "heldout.jsonl",
            "output": target,
            "questions": self.questions,
            "template": TEMPLATE,
            "stop": STOP,
            **self.evaluation,
            **({"reward-model": self.exported / "judge"} if judged else {}),
        }
        arguments = [argument for key, value in options.items() for argument in (f"--{key}", str(value))]
        return [sys.executable, "-m", "eval.mtbench", *models, *arguments]

    def rescore(self, name: str) -> list[str] | None:
        """The command that scores the replies of a branch's iterations by both reward models; None
        where the scores are up to date. DPO samples no replies: those of its evaluation stand for
        its last iteration."""
        stage, evaluation = self.stage(name), self.folder / "evaluation"
        replies = (
            evaluation / name / "heldout" / f"{name}.jsonl" if stage.name == "dpo" else stage / reward_model.REPLIES
        )
        start, own, judge = evaluation / "sft" / "heldout" / "sft.jsonl", self.exported / "own", self.exported / "judge"
        if up_to_date(stage / reward_model.RESCORED, replies, start, own, judge):
            return None
        if stage.name == "dpo":
            last = int((stage / "latest").read_text())
            dump(
                stage / reward_model.REPLIES,
                [{"iteration": last, "index": row["index"], "response": row["response"]} for row in read(replies)],
            )
        prompts = ["--prompts", str(self.folder / name / "data" / "heldout.jsonl"), "--prompt-length", "896"]
        models = ["--start", str(start), f"own={own}", f"other={judge}"]
        return [sys.executable, "-m", "eval.scores.reward_model", str(stage), *prompts, *models]

    def share_replies(self, output: str, other: str) -> None:
        """Copy what the evaluation ``other`` has generated and scored to the evaluation
        ``output``."""
        source, target = self.folder / "evaluation" / other, self.folder / "evaluation" / output
        for part in ("model_answer", "heldout", "heldout/kl", "heldout/score"):
            for path in (source / part).glob("*.jsonl"):
                if not up_to_date(target / part / path.name, path):
                    (target / part).mkdir(parents=True, exist_ok=True)
                    shutil.copy2(path, target / part)

    def works(self, make_model: list[list[str]], train_s: float) -> list[Work]:
        """All works, the most important first: where time or GPUs run out, the last ones are
        missing.

        ``make_model``: commands that make the model; empty where it exists. ``train_s``: seconds
        after which a branch's training ends.
        """
        exported_judge = partial(self.export, "judge", "reward", "judge")
        exported_sft = partial(self.export, "base", "sft", "sft")
        full = {"reward.global_batch_size": 2 * int(self.settings["reward.global_batch_size"])}
        return [
            Work("sft", (*make_model, self.submit("base", "sft"))),
            Work("reward", (self.submit("base", "reward"),), ("sft",)),
            Work("judge", (self.submit("judge", "reward", source="judge"), exported_judge), ("sft",)),
            *self._training(train_s),
            Work("own", (partial(self.export, "base", "reward", "own"),), ("reward",)),
            Work("sft-evaluated", (exported_sft, partial(self.evaluate, "sft", [], judged=False)), ("sft",)),
            *self._evaluations(),
            *self._rescorings(),
            Work("full", (self.submit("full", "reward", source="full", changes=full),), ("reward",)),
        ]

    def _training(self, train_s: float) -> Iterator[Work]:
        """The branches. The long ones have the largest load, so that they share the GPUs evenly,
        with or without light works on them."""
        for name, (pipeline, changes) in BRANCHES.items():
            after, load = ("sft", 1) if pipeline == "dpo" else ("reward", 3)
            command = self.submit(name, PIPELINES[pipeline][-1], pipeline, changes=changes)
            yield Work(name, (command, partial(self.require_checkpoint, name)), (after,), train_s, load)

    def _evaluations(self) -> Iterator[Work]:
        for name in BRANCHES:
            export = partial(self.export, name, self.stage(name).name, name)
            commands = (export, partial(self.evaluate, name, [name]))
            yield Work(f"{name}-evaluated", commands, (name, "sft-evaluated", "judge"))

    def _rescorings(self) -> Iterator[Work]:
        for name, (pipeline, _) in BRANCHES.items():
            after = (f"{name}-evaluated",) if pipeline == "dpo" else (name, "sft-evaluated", "judge")
            yield Work(f"{name}-rescored", (partial(self.rescore, name),), (*after, "own"))

    def report(self, done: dict[str, bool]) -> None:
        """Write result.json, table.md and result.png, one evaluation of all branches that exist
        (it generates nothing) and the report of all runs."""
        print(smollm2_result.write(self.folder, list(BRANCHES), done), flush=True)
        names = [name for name in BRANCHES if (self.folder / "evaluation" / name / "results.json").is_file()]
        together = self.folder / "evaluation" / "all"
        if names and (command := self.evaluate("all", names)):
            subprocess.run(command, check=False)
        runs = [self.folder / name for name in ("base", "judge", "full", *BRANCHES)]
        folders = [run for run in runs if (run / "config.json").is_file()]
        folders += [together] if (together / "results.json").is_file() else []
        output = ["--output", str(self.folder / "report")]
        subprocess.run([sys.executable, "-m", "launcher", "report", *map(str, folders), *output], check=False)
