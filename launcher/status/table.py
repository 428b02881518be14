"""What status and watch show, as lines of text for a given width: one screen a run, or one line a
run. Pure: no terminal, no clock."""

from __future__ import annotations

import textwrap
import time

import click

from launcher.run.folder import SUMMARY
from launcher.status import state
from launcher.status.state import RunStatus, StageState
from launcher.status.terminal import plain

COLOURS = {
    "done": "green",
    "running": "cyan",
    "pending": "yellow",
    "requeued": "yellow",
    **dict.fromkeys(state.BAD, "red"),
}
WIDE = 120
"""Columns from which on a bar and the numbers have room beside the rest."""
BAR = 20
LAST_LINES = 8
"""Of the failing rank's last lines, so many are shown."""
DATA_LINES = 6
"""Lines about the rows."""
DROP = ("bar", "try", "tokens/s", "job", "saved")
"""Columns that go first where the screen is too narrow."""


def run_lines(seen: RunStatus, width: int, now: float) -> list[str]:
    """The screen of one run: a row a stage, and below it why it waits or how it ended, each within
    ``width`` columns."""
    config = seen.run.config["run"]
    about = plain(f"id {config['id']}, profile {config['profile']}")
    lines = [click.style(plain(seen.run.folder), bold=True) + f"  {word(seen)}  {about}"]
    lines += trouble(seen, width)
    table = [cells(row, width, now) for row in seen.stages]
    for row, text in zip([None, *seen.stages], columns(table, width), strict=True):
        if row is None:
            lines.append(click.style(crop(text, width), dim=True))
            continue
        below = notes(seen, row, width, now)
        if len(below) == 1 and len(click.unstyle(text)) + len(below[0].strip()) + 2 <= width:
            text, below = f"{text}  {below[0].strip()}", []
        lines += [crop(text, width), *below]
    return [*lines, *data_lines(seen, width)]


def data_lines(seen: RunStatus, width: int) -> list[str]:
    """What was dropped and cut of the rows that the run trains on."""
    more = len(seen.data) - DATA_LINES
    said = [
        *seen.data[:DATA_LINES],
        *([f"{more} more such lines: {seen.run.folder / 'data' / SUMMARY}"] if more > 0 else []),
    ]
    return [line for text in said for line in wrap(f"data: {plain(text)}", width, "")]


def runs_lines(all_seen: list[RunStatus], width: int, now: float) -> list[str]:
    """One line a run: where it is, how fast, when it ends or why it does not."""
    table = []
    for seen in all_seen:
        row = current(seen)
        shown = cells(row, 0, now)
        said = [f"{row.kind}: {row.why}" if row.kind else row.why or numbers(row), start(row, now), previous(row)]
        if seen.overall == "done":
            said = [f"ended {span(now - row.ended)} ago" if row.ended else "", numbers_of_all(seen)]
        why = "; ".join(part for part in said if part)
        table.append(
            {
                "run": name_of(seen.run),
                "state": click.style(word(seen), COLOURS.get(row.state)),
                "stage": row.stage,
                **{name: shown[name] for name in ("iteration", "speed", "left", "saved")},
                "": why,
            }
        )
    lines = [crop(line, width) for line in columns(table, width)]
    lines[0] = click.style(lines[0], dim=True)
    return [*dict.fromkeys(line for seen in all_seen for line in unanswered(seen, width)), *lines]


def name_of(run) -> str:
    """As a person would type it: an element of a sweep with the sweep's name."""
    return plain(f"{run.folder.parent.name}/{run.folder.name}" if "sweep" in run.config["run"] else run.folder.name)


def cells(row: StageState, width: int, now: float) -> dict[str, str]:
    """Column -> text of one stage."""
    far = row.progress
    made = {
        "stage": row.stage,
        "state": click.style(row.word, COLOURS.get(row.state)),
        "iteration": "" if far.iteration is None else f"{far.iteration}/{far.total}",
    }
    if width >= WIDE:
        made["bar"] = bar(far.iteration, far.total) if row.state in state.ACTIVE or row.state in state.BAD else ""
    made |= {
        "speed": speed(far.speed),
        "tokens/s": "" if far.tokens_per_s is None else f"{far.tokens_per_s:,.0f}",
        "left": clock(far.eta_s),
        "saved": saved(row, now),
        "job": str(row.job or ""),
        "try": str(row.attempt) if row.attempt > 1 else "",
    }
    if width >= WIDE:
        made["numbers"] = numbers(row)
    return made


def columns(table: list[dict[str, str]], width: int) -> list[str]:
    """Header and rows, aligned; empty columns are left out, and those of DROP while it is too wide
    (``width`` 0: never)."""
    names = (
        [name for name in table[0] if name in ("stage", "state", "") or any(row[name] for row in table)]
        if table
        else []
    )
    size = {name: max(len(click.unstyle(text)) for text in (name, *(row[name] for row in table))) for name in names}
    for name in DROP:
        if width and sum(size[each] + 2 for each in names if each) - 2 > width and name in names:
            names.remove(name)
    rows = [{name: name for name in names}, *table]
    return [
        "  ".join(row[name] + " " * (size[name] - len(click.unstyle(row[name]))) for name in names).rstrip()
        for row in rows
    ]


def notes(seen: RunStatus, row: StageState, width: int, now: float) -> list[str]:
    """The lines under a stage's row."""
    made = []
    if width < WIDE and row.state != "not submitted":
        made.append(numbers(row))
    made.append(
        "; ".join(
            part
            for part in (
                f"{row.kind}: {row.why}" if row.kind and row.state in state.BAD else row.why,
                start(row, now),
                f"on {row.nodes}" if row.nodes else "",
            )
            if part
        )
    )
    made.append(previous(row))
    lines = [line for text in made if text for line in wrap(text, width)]
    if row.state not in state.BAD:
        return lines
    lines += wrap(f"do: {row.advice}", width) if row.advice else []
    if row.lines:
        whose = "" if row.rank is None else f" of rank {row.rank}"
        lines += wrap(f"last lines{whose}, more by: logs {plain(seen.run.folder)} {row.stage} --errors", width)
        lines += [crop(f"    | {text}", width) for text in row.lines[-LAST_LINES:]]
    return lines


def previous(row: StageState) -> str:
    """Why the stage was queued again."""
    last = row.previous
    return plain(f"attempt {last['attempt']} ({last['class']}): {last['cause']}") if last else ""


def unanswered(seen: RunStatus, width: int) -> list[str]:
    """That Slurm does not answer, with the last of its own words."""
    if not seen.trouble:
        return []
    said = f"Slurm can't be asked: {seen.trouble.splitlines()[-1]}; this is what the run's files say"
    return [click.style(line, "red") for line in wrap(said, width, "")]


def trouble(seen: RunStatus, width: int) -> list[str]:
    if not seen.stop:
        return unanswered(seen, width)
    return [
        *unanswered(seen, width),
        *wrap(
            "the file STOP is in the run folder: what runs saves and ends, nothing starts; resume removes it", width, ""
        ),
    ]


def word(seen: RunStatus) -> str:
    """The run's state in a word; "idle" where stages are left that nobody works on."""
    return current(seen).word if seen.overall == "failed" else seen.overall


def current(seen: RunStatus) -> StageState:
    """The stage that tells where a run is: what went wrong, else what runs, else what waits, else
    the last that is done."""
    for wanted in (("failed", "lost"), ("stopped",), ("cancelled",), ("running",), ("requeued",), ("pending",)):
        for row in seen.stages:
            if row.state in wanted:
                return row
    done = [row for row in seen.stages if row.state == "done"]
    return done[-1] if done else seen.stages[0]


def start(row: StageState, now: float) -> str:
    """When Slurm expects a waiting job to start."""
    if row.starts is None or row.state not in ("pending", "requeued") or row.starts <= now:
        return ""
    form = "%H:%M" if row.starts - now < 43_200 else "%a %d %b %H:%M"
    return f"may start {time.strftime(form, time.localtime(row.starts))}, in {span(row.starts - now)}"


def saved(row: StageState, now: float) -> str:
    """Last checkpoint: its iteration, and its age while the stage is not done."""
    far = row.progress
    if far.saved is None:
        return ""
    return (
        str(far.saved)
        if row.state == "done" or far.saved_at is None
        else f"{far.saved}, {span(now - far.saved_at)} ago"
    )


def numbers(row: StageState) -> str:
    return "  ".join(f"{name} {value:.4g}" for name, value in row.progress.numbers.items())


def numbers_of_all(seen: RunStatus) -> str:
    return "  ".join(f"{row.stage} {numbers(row)}" for row in seen.stages if row.progress.numbers)


def bar(done: int | None, total: int | None) -> str:
    if not total:
        return ""
    full = max(0, min(BAR, BAR * (done or 0) // total))
    return "#" * full + "." * (BAR - full)


def speed(per_second: float | None) -> str:
    if per_second is None:
        return ""
    return f"{per_second:.3g} it/s" if per_second >= 1 else f"{1 / per_second:.3g} s/it"


def clock(seconds: float | None) -> str:
    """Time left: minutes:seconds, hours:minutes:seconds."""
    if seconds is None:
        return ""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes}:{rest:02d}"


def span(seconds: float) -> str:
    """A duration in words: 40 s, 12 min, 3.5 h, 2 days."""
    seconds = max(0, seconds)
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 6000:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 172_800 else f"{seconds / 86_400:.0f} days"


def wrap(text: str, width: int, indent: str = "    ") -> list[str]:
    return textwrap.wrap(text, width, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False) or [
        indent
    ]


def crop(text: str, width: int) -> str:
    """A line of plain text, or styled and short enough, within ``width``."""
    if len(click.unstyle(text)) <= width:
        return text
    over = len(click.unstyle(text)) - width + 1
    return text[:-over] + "…"  # what is too long stands at the end, and is not styled
