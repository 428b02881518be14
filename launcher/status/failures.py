"""The console for what is printed, and what to read when a stage failed."""

from __future__ import annotations

from rich.console import Console
from rich.segment import Segment

from launcher.run.folder import Run
from launcher.status import row as stage_row
from launcher.status import state
from launcher.status.logs import attempts
from launcher.status.state import RunStatus, StageState
from launcher.status.terminal import PIPE_WIDTH, columns_of, plain


class Plain(Console):
    """A console that shows foreign text as it stands.

    "[red]" gives no colour, and an escape sequence does nothing to the terminal.
    """

    def __init__(self):
        super().__init__(highlight=False, soft_wrap=True, markup=False, emoji=False)

    def render(self, renderable, options=None):
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(plain(segment.text), segment.style)


def console() -> Console:
    """Wide enough for one line a stage when the output is a file or a pipe."""
    console = Plain()
    console.width = columns_of(console.width) if console.is_terminal else max(console.width, PIPE_WIDTH)
    return console


def failures(status: RunStatus, stages: list[str]) -> list[str]:
    """A text for each stage that did not end well: its cause, what to do, and where its log is."""
    return [_failure(status.run, row) for row in status.stages if row.stage in stages and row.state in state.BAD]


def _failure(run: Run, row: StageState) -> str:
    logs = attempts(run, row.stage)
    lines = [
        f"{row.stage} {row.state_word}: {stage_row.reason(row)}",
        stage_row.advice_text(row),
        f"log: {logs[-1] if logs else run.stage(row.stage) / 'logs'}",
        f"then: python -m launcher resume {run.folder}",
    ]
    return "\n  ".join(filter(None, lines))
