"""Writes the generated pages of the reference from the code.

``python docs/reference.py`` writes configuration.md, command-line.md and failures.md in
docs/reference/. ``--check`` writes nothing and exits 1 where a page is not what the code says.
"""

from __future__ import annotations

import ast
import dataclasses
import html
import inspect
import json
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterable
from pathlib import Path

import click

from launcher.cli import main as launcher
from launcher.config.network import Fits, Network
from launcher.config.profile import Container, Machine, Profile
from launcher.config.sections import SECTIONS, Resources, StageResources
from launcher.job.advice import ADVICE, EVERY
from launcher.job.outcome import FAULTLESS_KINDS, REQUEUED_KINDS, OutcomeKind
from training.config.trainers import RolloutConfig, TrainerConfig

ROOT = Path(__file__).parents[1]
NOTICE = "<!-- Written by docs/reference.py from the code (make docs). Change the code, not this page. -->"
FILLED = {"paths", "name", "machine", "container", "network_table", "fits"}
"""Fields that are no keys of a row: the launcher fills them, or they are tables of their own."""
TRAINERS = [name for name, config in SECTIONS.items() if issubclass(config, TrainerConfig)]
ROLLOUTS = [name for name in TRAINERS if issubclass(SECTIONS[name], RolloutConfig)]

TYPED = [
    "conversion.hf_to_megatron",
    "conversion.megatron_to_hf",
    "conversion.verify",
    "conversion.megatron_lm read",
    "conversion.megatron_lm write",
    "eval.mtbench",
    "eval.report",
    "eval.scores",
    "eval.scores.reward_model",
    "eval.judge.serve",
]
"""Programs that you type, with a subcommand where there is one."""
STARTED = [
    "training.data.prepare",
    "training.data.peek",
    "training.data.trial",
    "training.data.cuts",
    "training.sft",
    "training.reward",
    "training.ppo",
    "training.grpo",
    "training.dpo",
    "training.distributed.gpu_check",
    "eval.__main__",
    "eval.answers.chat",
    "eval.questions",
    "launcher.job.supervise",
    "launcher.job.node_check",
    "launcher.slurm.node_probe",
    "launcher.slurm.transaction",
    "launcher.submit.local",
    "launcher.submit.start_sweep",
    "launcher.run_module",
]
"""Programs that the launcher or a job starts, in the order in which a run needs them."""


def field_docs(config: type) -> dict[str, str]:
    """Field -> its doc line: the string after the field, of the class nearest in the MRO that has
    one. Fields without a line are missing."""
    docs = {}
    for base in filter(dataclasses.is_dataclass, reversed(config.__mro__)):
        body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0].body
        for field, after in zip(body, body[1:], strict=False):
            literal = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
            if isinstance(field, ast.AnnAssign) and literal:
                docs[field.target.id] = " ".join(after.value.value.split())
    return docs


def cell(text: str) -> str:
    """``text`` as one cell of a Markdown table."""
    text = " ".join(text.split()).replace("``", "`")
    outside = re.split(r"(`[^`]*`)", text)
    for index, part in enumerate(outside):
        outside[index] = code(part[1:-1]) if index % 2 else re.sub(r"([*<>|\[\]])", r"\\\1", part)
    return "".join(outside)


def code(text: str) -> str:
    """A code span of a table's cell. Renderers disagree about an escaped "|" in backticks."""
    return f"`{text}`" if "|" not in text else f"<code>{html.escape(text).replace('|', '&#124;')}</code>"


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    header = list(header)
    return ["| " + " | ".join(header) + " |", "|" + "---|" * len(header), *lines, ""]


def stacked(lines: list[str]) -> list[str]:
    """A table whose last column is below the others on a phone (docs/site.css)."""
    return ['<div class="keys" markdown>', "", *lines, "</div>", ""]


def default(field: dataclasses.Field) -> str:
    """The default as TOML writes it."""
    if field.default_factory is not dataclasses.MISSING:
        return code({"list": "[]", "dict": "{}"}[field.type])
    if field.default is dataclasses.MISSING:
        return "required"
    if isinstance(field.default, float):
        return code(repr(field.default))
    return code(json.dumps(field.default, ensure_ascii=False))


def defaults(name: str, sections: list[str]) -> str:
    """One default, or each section's where they differ."""
    of_section = {section: default(fields(SECTIONS[section])[name]) for section in sections}
    if len(set(of_section.values())) == 1:
        return of_section[sections[0]]
    return "<br>".join(f"{section}: {value}" for section, value in of_section.items())


def fields(config: type) -> dict[str, dataclasses.Field]:
    return {field.name: field for field in dataclasses.fields(config) if field.name not in FILLED}


def keys(config: type, sections: list[str] = (), leave_out: type | None = None) -> list[str]:
    """The table of a dataclass's keys; those that ``leave_out`` has, too, stand elsewhere."""
    docs, other = field_docs(config), fields(leave_out) if leave_out else {}
    rows = [
        (code(name), field.type, defaults(name, sections) if sections else default(field), cell(docs[name]))
        for name, field in fields(config).items()
        if name not in other
    ]
    return stacked(table(("key", "type", "default", "meaning"), rows))


def about(config: type) -> str:
    """First paragraph of a class's docstring."""
    return cell(inspect.getdoc(config).split("\n\n")[0])


def configuration() -> str:
    lines = [
        NOTICE,
        "# Configuration keys",
        "",
        "A run's configuration is TOML: a section for the model, the data and each stage, and one for",
        "resources. Later ones win: defaults, then the recipe, then each `--config FILE`, then each",
        "`--set SECTION.KEY=VALUE`. A misspelt key is an error that names the nearest one. A site's",
        "profile is a file of its own: see [Profile](#profile).",
        "",
        "```toml",
        "[sft]",
        "lr = 1e-5            # on the command line: --set sft.lr=1e-5",
        "[resources.sft]",
        "nodes = 2            # --set resources.sft.nodes=2",
        "```",
        "",
        "Guides: [data](../guides/data.md), [algorithms](../guides/algorithms.md),",
        "[layout](../guides/layout.md), [sites](../guides/sites.md),",
        "[evaluation](../guides/evaluation.md).",
        "",
    ]
    for name in ("model", "data", "convert"):
        lines += [f"## {name}", "", *keys(SECTIONS[name])]
    listed = ", ".join(f"`{name}`" for name in TRAINERS)
    lines += ["## Every trainer", "", f"Keys of each of {listed}.", "", *keys(TrainerConfig, TRAINERS)]
    for name in TRAINERS:
        above = RolloutConfig if name in ROLLOUTS else TrainerConfig
        if name == ROLLOUTS[0]:
            title = " and ".join(ROLLOUTS)
            intro = "Keys of both, in addition to those of [every trainer](#every-trainer)."
            lines += [f"## {title}", "", intro, "", *keys(RolloutConfig, ROLLOUTS, TrainerConfig)]
        own = keys(SECTIONS[name], [name], above)
        link = "" if name in ROLLOUTS else "Also the keys of [every trainer](#every-trainer)."
        if name in ROLLOUTS:
            link = f"Also the keys of [both](#{'-'.join(title.split())}) and of [every trainer](#every-trainer)."
        lines += [f"## {name}", "", link, "", *own]
    for name in ("export", "mtbench"):
        lines += [f"## {name}", "", *keys(SECTIONS[name])]
    stages = [field.name for field in dataclasses.fields(StageResources)]
    without = [name for name in stages if getattr(StageResources(), name).gpus_per_node == 0]
    lines += [
        "## resources.STAGE",
        "",
        *wrapped(
            f"One table a stage: {', '.join(f'`resources.{name}`' for name in stages)}. "
            f"For {' and '.join(f'`{name}`' for name in without)} `gpus_per_node` is 0 where nothing else is set."
        ),
        "",
        *keys(Resources),
        "## Profile",
        "",
        "A site: `NAME.toml` in `slurm/clusters/`, or a file that `--profile FILE.toml` names. It is named",
        "after its file.",
        "",
        *keys(Profile),
    ]
    for name, config in (("machine", Machine), ("container", Container)):
        lines += [f"### [{name}] of a profile", "", *wrapped(about(config)), "", *keys(config)]
    lines += [
        "## Network",
        "",
        *wrapped(
            "What connects the nodes of a site: `NAME.toml` in `slurm/networks/`, or a file next to the profile that "
            'its key `network = "NAME.toml"` names.'
        ),
        "",
        *keys(Network),
        "### [fits] of a network",
        "",
        *wrapped(about(Fits)),
        "",
        *keys(Fits),
    ]
    return "\n".join(lines).rstrip() + "\n"


def wrapped(paragraph: str) -> list[str]:
    return textwrap.wrap(paragraph, 100, break_long_words=False, break_on_hyphens=False)


def prose(help_text: str) -> list[str]:
    """click's help text as Markdown: what follows a ``\\b`` keeps its lines."""
    lines = []
    for paragraph in inspect.cleandoc(help_text).split("\n\n"):
        if not paragraph.startswith("\b"):
            lines += [*wrapped(cell(paragraph)), ""]
            continue
        block = paragraph.removeprefix("\b\n").splitlines()
        while block:
            indented = block[0].startswith(" ")
            count = next((i for i, line in enumerate(block) if line.startswith(" ") != indented), len(block))
            part, block = textwrap.dedent("\n".join(block[:count])), block[count:]
            lines += ["```text", part, "```", ""] if indented or ":  " in part else [*wrapped(cell(part)), ""]
    return lines


def values(parameter: click.Parameter) -> str:
    """What an option or an argument takes."""
    if isinstance(parameter.type, click.Choice):
        return ", ".join(code(choice) for choice in parameter.type.choices)
    if getattr(parameter, "is_flag", False):
        return ""
    return code(parameter.metavar or parameter.type.name.upper().removesuffix(" RANGE"))


def parameters(command: click.Command) -> list[str]:
    arguments = [parameter for parameter in command.params if isinstance(parameter, click.Argument)]
    options = [
        parameter for parameter in command.params if isinstance(parameter, click.Option) and not parameter.hidden
    ]
    lines = []
    if choices := [argument for argument in arguments if isinstance(argument.type, click.Choice)]:
        for argument in choices:
            lines += [*wrapped(f"{code(argument.name.upper())}: one of {values(argument)}."), ""]
    rows = []
    for option in options:
        names = ", ".join(code(name) for name in option.opts)
        shown = re.sub(r" *\[default: (.*)\]$", r" Default: \1.", option.help or "")
        if isinstance(option.show_default, str):
            shown += f" Default: {option.show_default}."
        elif option.show_default and option.default not in (None, False):
            shown += f" Default: `{option.default}`."
        rows.append((names, values(option), cell(shown)))
    return [*lines, *stacked(table(("option", "value", "meaning"), rows))]


def usage(name: str, command: click.Command) -> str:
    parts = [f"python -m launcher {name}", "[OPTIONS]" if command.params else ""]
    for argument in command.params:
        if isinstance(argument, click.Argument):
            word = argument.name.upper() + ("..." if argument.nargs == -1 else "")
            parts.append(word if argument.required else f"[{word}]")
    return " ".join(filter(None, parts))


def help_of(program: str) -> str:
    """What ``python -m program --help`` prints at 100 columns."""
    shown = subprocess.run(
        [sys.executable, "-m", *program.split(), "--help"],
        cwd=ROOT,
        env=os.environ | {"COLUMNS": "100", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
        stdin=subprocess.DEVNULL,
    )
    return shown.stdout.rstrip()


def docstring(module: str) -> str:
    """First sentence of what a module says of itself, without its command."""
    path = ROOT / (module.replace(".", "/") + ".py")
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    first = " ".join(text.split("\n\n")[0].split())
    first = re.sub(r"^``[^`]*``:? ?", "", first)
    first = re.split(r"(?<=[.?]) (?=[A-Z])", first)[0]
    return cell(first[:1].upper() + first[1:])


def command_line() -> str:
    lines = [
        NOTICE,
        "# Command line",
        "",
        "`convoy` is the same as `python -m launcher`. `-h` shows a command's help.",
        "",
        *prose(launcher.help),
    ]
    for name, command in launcher.commands.items():
        lines += [f"## {name}", "", "```text", usage(name, command), "```", ""]
        lines += [*prose(command.help), *parameters(command)]
    lines += ["## Other programs", "", "These need no run: they work on files that you name.", ""]
    for program in TYPED:
        lines += [f"### {program}", "", "```text", help_of(program), "```", ""]
    lines += [
        "## What a run starts",
        "",
        "The launcher and a job start these. You need them only to look closer.",
        "",
        *table(
            ("program", "what it does"),
            ((code(f"python -m {module.removesuffix('.__main__')}"), docstring(module)) for module in STARTED),
        ),
    ]
    return "\n".join(lines).rstrip() + "\n"


def failures() -> str:
    lines = [
        NOTICE,
        "# Classes of endings",
        "",
        "`status` names the class, the cause and what to do. [Why was I requeued](../operations/requeue.md)",
        "explains them. Here is what the code has for each class, for each kind of stage.",
        "",
        "- *Trainer* is `sft`, `reward` or `dpo`; *rollout* is `rlhf` or `grpo`.",
        "- *Conversion* is `convert` or `export`; *evaluation* is `mtbench`. *Every* is any other stage.",
        "- An attempt without progress counts towards `no progress`; two in a row end the stage.",
        "",
    ]
    rows = []
    for kind in OutcomeKind:
        if kind is OutcomeKind.DONE:
            continue
        advice = {group: cell(text.replace("{stage}", "STAGE")) for group, text in ADVICE[kind.value].items()}
        texts = [
            text if group == EVERY and len(advice) == 1 else f"*{group}*: {text}" for group, text in advice.items()
        ]
        counts = "" if kind not in REQUEUED_KINDS else "no" if kind in FAULTLESS_KINDS else "unless it saved"
        rows.append((code(kind.value), "yes" if kind in REQUEUED_KINDS else "no", counts, "<br>".join(texts)))
    header = ("class", "queues itself again", "counts as without progress", "what to do when it has ended for good")
    return "\n".join([*lines, *table(header, rows)]).rstrip() + "\n"


PAGES = {"configuration.md": configuration, "command-line.md": command_line, "failures.md": failures}


def stale() -> dict[Path, str]:
    """Pages that are not what the code says -> what they should hold."""
    pages = {ROOT / "docs/reference" / name: write() for name, write in PAGES.items()}
    return {page: text for page, text in pages.items() if not page.exists() or page.read_text(encoding="utf-8") != text}


def main(arguments: list[str]) -> int:
    pages = stale()
    for page, text in pages.items():
        if "--check" in arguments:
            print(f"{page.relative_to(ROOT)} is not what the code says; run: python docs/reference.py", file=sys.stderr)
        else:
            page.write_text(text, encoding="utf-8")
            print(page.relative_to(ROOT))
    return int("--check" in arguments and bool(pages))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
