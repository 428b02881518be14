"""``python -m eval.report RUN [RUN...]``: one self-contained HTML page about runs or evaluations.
It loads nothing from anywhere.

Made from the files in the runs' folders alone, so it can be made again, of several runs together,
and of one that is not finished.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from eval.errors import DataError
from eval.files.foreign import plain
from eval.files.jsonl import write as write_text
from eval.report import answer_browser, curves, figures, merge, reward_accuracy, run_facts, run_folder, table
from eval.report.run_folder import Run

CHECKS = (
    ("texts", "Texts", "d", "Texts that were checked."),
    ("empty", "Empty", "%", "Share of texts with nothing but white space."),
    ("truncated", "Truncated", "%", "Share cut at the limit of new tokens."),
    ("eos_rate", "EOS", "%", "Share that the model ended with its end-of-sequence token."),
    ("role_markers", "Roles", "%", "Share that speaks for a role, or was stopped as it began to."),
    ("repeated_ngrams", "Repeats", "%", "Mean share of a text's word 4-grams that occurred in it before."),
    ("distinct_1", "Distinct-1", ".2f", "Different words over all words of all texts."),
    ("distinct_2", "Distinct-2", ".2f", "Different word pairs over all word pairs of all texts."),
    ("words", "Words", ".1f", "Mean words of a text."),
    ("tokens", "Tokens", ".1f", "Mean generated tokens of a text."),
)
"""Measure, column, format, meaning."""


def number(value: float | None, form: str = ".2f") -> str:
    """A number for a reader: "%" as form makes a percentage; None is a dash."""
    if value is None:
        return "–"
    if form == "%":
        return f"{100 * value:.1f}%"
    return f"{value:{form}}".replace("-", "−")


def minus(text: str) -> str:
    """Hyphens that begin a number as true minus signs."""
    return re.sub(r"(?<![\w.])-(?=\d)", "−", text)


def interval(value: Mapping | None, form: str = ".2f") -> str:
    return (
        "–"
        if value is None
        else f"{number(value['mean'], form)} [{number(value['low'], form)}, {number(value['high'], form)}]"
    )


def duration(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s" if minutes else f"{rest} s"


def collect(folders: Sequence[str | Path]) -> dict[str, Run]:
    """Name -> run; raises DataError for a folder without one."""
    return merge.names(
        [run_folder.collect(folder) for folder in {Path(folder).resolve(): folder for folder in folders}.values()]
    )


def evaluations(runs: Mapping[str, Run]) -> dict[str, run_folder.Evaluation]:
    """Run -> its evaluation, for those that have one; models carry their run's name where there are
    several runs."""
    entries = {name: run.evaluation for name, run in runs.items() if run.evaluation}
    return {name: merge.renamed(name, one) for name, one in entries.items()} if len(runs) > 1 else entries


def blocks(judged: Mapping[str, run_folder.Evaluation]) -> tuple[list[dict], list[str]]:
    """(tables of scores, why there is more than one): one of all runs where they were judged alike,
    else one a run."""
    if not judged:
        return [], []
    different = merge.contradictions(judged)
    if len(judged) == 1:
        return [_block("", next(iter(judged.values())).results)], []
    if not different:
        return [_block("", merge.together(judged))], []
    return [_block(name, one.results) for name, one in judged.items()], different


def _block(name: str, results: dict) -> dict:
    scores = results["scores"]
    rated = (
        {
            model: {category: cell["mean"] for category, cell in row["categories"].items()}
            for model, row in scores["models"].items()
            if row["covered"]
        }
        if scores
        else {}
    )
    return {
        "name": name,
        "results": results,
        "title": table.title(results),
        "missing": table.missing(results),
        "rows": table.rows(scores) if scores else [],
        "notes": table.notes(results),
        "pairs": table.pair_rows(results["pairwise"]) if results["pairwise"] else [],
        "radar": Markup(figures.radar_svg(rated, f"radar{name}")) if rated else None,
        "models": list(rated),
    }


def training(runs: Mapping[str, Run]) -> list[dict]:
    """[{"stage", "panels", "others"}] in the order of the first run that has the stage; a stage
    without a curve is left out."""
    order = dict.fromkeys(
        stage.name for run in runs.values() for stage in run.stages if not run_folder.is_evaluation(stage.folder)
    )
    entries = []
    for name in order:
        rows = {
            run_name: stage.metrics
            for run_name, run in runs.items()
            for stage in run.stages
            if stage.name == name and stage.metrics
        }
        panels, others = curves.panels(name, rows)
        if panels or others:
            entries.append({"stage": name, "panels": panels, "others": others})
    return entries


def measured(runs: Mapping[str, Run]) -> dict[str, Run]:
    """The runs, each without the stages that one before it shows already: one taken from another
    run (``submit --reuse``) has its metrics to the last digit."""
    seen, entries = [], {}
    for name, run in runs.items():
        new = [stage for stage in run.stages if not stage.metrics or (stage.name, stage.metrics) not in seen]
        seen += [(stage.name, stage.metrics) for stage in new]
        entries[name] = dataclasses.replace(run, stages=new)
    return entries


class Parts:
    """Makes the parts of a page: one that can't be made, whatever the runs' files hold, is named in
    its place, and the others stand."""

    def __init__(self):
        self.failed: list[str] = []

    def make(self, title: str, function: Callable, *arguments, empty=None):
        """What ``function`` returns, or ``empty`` where it fails."""
        try:
            return function(*arguments)
        except Exception as error:  # noqa: BLE001 - hours of work must not end without a report
            self.failed.append(
                f"{title}: left out, the files that it is made from are damaged ({type(error).__name__}: {error})"[:400]
            )
            return empty

    def guarded(self, title: str, caller: Callable) -> str:
        """For a template's {% call %}: its text, or a notice."""
        content = self.make(title, caller)
        return content if content is not None else Markup('<p class="notice">{}</p>').format(plain(self.failed[-1]))


def page(runs: Mapping[str, Run]) -> str:
    """The HTML text; the same input gives the same bytes. What is damaged in the runs' files is
    named in it."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parents[1] / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "interval": interval, "duration": duration, "minus": minus}
    parts = Parts()
    values = _values(runs, parts)
    return environment.get_template("report.html.j2").render(
        title=", ".join(runs),
        runs=runs,
        header=table.HEADER,
        note=table.NOTE,
        pair_header=table.PAIR_HEADER,
        pair_note=table.PAIR_NOTE,
        checks_columns=CHECKS,
        guarded=parts.guarded,
        damaged=[plain(line) for line in (*(line for run in runs.values() for line in run.damaged), *parts.failed)],
        **values,
    )


def _values(runs: Mapping[str, Run], parts: Parts) -> dict:
    """What the page's parts show, by name."""
    make = parts.make
    judged = make("Evaluations", evaluations, runs, empty={})
    entries, different = make("Scores", blocks, judged, empty=([], []))
    common = make("Before the judge", merge.beside, list(judged.values())) if judged else None
    own = make("Training", measured, runs, empty={})
    several = len(runs) > 1

    def labelled(stages: Callable[[Run], Mapping]) -> dict:
        return {
            f"{name}, {stage}" if several else stage: row
            for name, run in own.items()
            for stage, row in stages(run).items()
        }

    preference = make(
        "Reward model",
        labelled,
        lambda run: reward_accuracy.summary({stage.name: stage.folder for stage in run.stages}),
        empty={},
    )
    calibrated = {label: row["calibration"] for label, row in preference.items() if row["calibration"]}
    gold = common["heldout"]["gold"] if common else {}
    rates = {name: {stage.name: stage.metrics for stage in run.stages} for name, run in own.items()}
    return {
        "blocks": entries,
        "different": different,
        "common": common,
        "evaluations": judged,
        "gold_figure": make("Gold score", lambda: Markup(figures.interval_svg(gold, "gold"))) if gold else None,
        "frontier": make("Reward against distance", curves.frontiers, rates),
        "preference": preference,
        "language": make("Held-out loss", labelled, run_facts.language_models, empty={}),
        "calibration": make("Calibration", lambda: Markup(figures.calibration_svg("calibration", calibrated)))
        if calibrated
        else None,
        "calibrated": list(calibrated),
        "training": make("Training", training, own, empty=[]),
        "stages": {name: make("Time and memory", run_facts.stage_rows, run, empty=[]) for name, run in runs.items()},
        "differences": make("Configuration", run_facts.differences, list(runs.values()), empty=[]) if several else [],
        "configuration": [] if several else make("Configuration", _configuration, runs, empty=[]),
        "provenance_rows": {
            name: make("Provenance", run_facts.provenance, run, empty=[]) for name, run in runs.items()
        },
        "heldout": make("Samples", answer_browser.heldout, judged, empty=[]),
        "questions": make("Questions", answer_browser.questions, judged, empty=[]),
        "unjudged": [name for name in runs if name not in judged],
    }


def _configuration(runs: Mapping[str, Run]) -> list[tuple[str, str]]:
    return [
        (key, run_facts.written(value)) for run in runs.values() for key, value in run_facts.flat(run.config).items()
    ]


def write(runs: Mapping[str, Run], path: Path) -> None:
    # half a character is in no file of UTF-8
    text = page(runs).encode("utf-8", errors="replace").decode()
    # as a browser would show it, but without calling the page broken
    write_text(path, text.replace("\0", "\ufffd"))


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m eval.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="a run's folder, or the output of python -m eval.mtbench"
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FOLDER",
        help="where report.html goes, of several runs with table.md, table.csv and results.json "
        "(default: the run's folder; of several runs report-A-B beside the first)",
    )
    options = parser.parse_args(arguments)
    try:
        runs = collect(options.runs)
    except DataError as error:
        print(plain(error), file=sys.stderr)
        return 65
    first = Path(options.runs[0])
    joined = "-".join(["report", *(name.replace("/", "-") for name in runs)])
    output = options.output or (first if len(runs) == 1 else first.parent / joined)
    write(runs, output / "report.html")
    if len(runs) > 1:
        parts = Parts()
        for block in parts.make("table.md", lambda: blocks(evaluations(runs))[0], empty=[]):
            parts.make("table.md", table.write, output / block["name"], block["results"])
        print(*map(plain, parts.failed), sep="\n", end="\n" if parts.failed else "", file=sys.stderr)
    print(output / "report.html")
    return 0
