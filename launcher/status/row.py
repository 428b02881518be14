"""A stage's state as texts: the cells of its row and the notes below it.

status, watch, submit --wait, sweeps, cancel and failures all take them from here.
"""

from __future__ import annotations

import time

import click

from launcher.status.state import ACTIVE, BAD, StageState
from launcher.status.terminal import plain

COLOURS = {
    "done": "green",
    "running": "cyan",
    "pending": "yellow",
    "requeued": "yellow",
    **dict.fromkeys(BAD, "red"),
}
BAR_WIDTH = 20
COLUMNS = ("stage", "state", "iteration", "bar", "speed", "tokens/s", "left", "saved", "job", "try", "numbers")


def row_cells(row: StageState, now: float) -> dict[str, str]:
    """Each of COLUMNS -> its text; "" where there is nothing to tell. The state is coloured."""
    progress = row.progress
    texts = (
        row.stage,
        click.style(row.state_word, COLOURS.get(row.state)),
        "" if progress.iteration is None else f"{progress.iteration}/{progress.total}",
        progress_bar(progress.iteration, progress.total) if row.state in (*ACTIVE, *BAD) else "",
        format_speed(progress.speed),
        "" if progress.tokens_per_s is None else f"{progress.tokens_per_s:,.0f}",
        format_eta(progress.eta_s),
        last_checkpoint(row, now),
        str(row.job or ""),
        str(row.attempt) if row.attempt > 1 else "",
        metrics_text(row),
    )
    return dict(zip(COLUMNS, texts, strict=True))


def reason(row: StageState) -> str:
    """Why it waits or how it ended, with the class of the ending."""
    return f"{row.kind}: {row.why}" if row.kind else row.why


def reason_suffix(row: StageState) -> str:
    """The reason in brackets, to stand behind a state."""
    return f" ({reason(row)})" if row.why else ""


def expected_start(row: StageState, now: float) -> str:
    """When Slurm expects a waiting job to start; "" where it does not say."""
    if row.starts is None or row.state not in ("pending", "requeued") or row.starts <= now:
        return ""
    form = "%H:%M" if row.starts - now < 43_200 else "%a %d %b %H:%M"
    return f"may start {time.strftime(form, time.localtime(row.starts))}, in {format_age(row.starts - now)}"


def requeue_reason(row: StageState) -> str:
    """Why the stage was queued again; "" where it was not."""
    last = row.previous
    return plain(f"attempt {last['attempt']} ({last['class']}): {last['cause']}") if last else ""


def situation(row: StageState, now: float) -> list[str]:
    """Why it waits or how it ended, when it may start and why it was queued again: what there is
    to say of these."""
    return [text for text in (reason(row), expected_start(row, now), requeue_reason(row)) if text]


def advice_text(row: StageState) -> str:
    """What to do about a bad ending; "" where that is not known."""
    return f"do: {row.advice}" if row.advice else ""


def last_checkpoint(row: StageState, now: float) -> str:
    """Its iteration, and its age while the stage is not done."""
    progress = row.progress
    if progress.saved is None:
        return ""
    if row.state == "done" or progress.saved_at is None:
        return str(progress.saved)
    return f"{progress.saved}, {format_age(now - progress.saved_at)} ago"


def metrics_text(row: StageState) -> str:
    """All metrics of the last line that the stage logged."""
    return "  ".join(f"{name} {format_metric(value)}" for name, value in row.progress.numbers.items())


def format_metric(value: float) -> str:
    return f"{value:.4g}"


def before_cancel(row: StageState) -> str:
    """What a stage was doing, for the person who stopped it."""
    progress = row.progress
    at = f" at iteration {progress.iteration} of {progress.total}" if progress.iteration is not None else ""
    saved = f", last checkpoint {progress.saved}" if progress.saved is not None else ""
    return f"{row.stage} was {row.state}{at}{saved}" + reason_suffix(row)


def progress_bar(iteration: int | None, total: int | None) -> str:
    if not total:
        return ""
    full = max(0, min(BAR_WIDTH, BAR_WIDTH * (iteration or 0) // total))
    return "#" * full + "." * (BAR_WIDTH - full)


def format_speed(per_second: float | None) -> str:
    """ "2.5 it/s", or "3.1 s/it" below one a second."""
    if per_second is None:
        return ""
    return f"{per_second:.3g} it/s" if per_second >= 1 else f"{1 / per_second:.3g} s/it"


def format_eta(seconds: float | None) -> str:
    """Time left as minutes:seconds or hours:minutes:seconds; "" for None."""
    if seconds is None:
        return ""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes}:{rest:02d}"


def format_age(seconds: float) -> str:
    """A duration in words: 40 s, 12 min, 3.5 h, 2 days."""
    seconds = max(0, seconds)
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 6000:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 172_800 else f"{seconds / 86_400:.0f} days"
