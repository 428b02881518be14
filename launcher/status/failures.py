"""What a person sees besides status: the plan, and what to read when something failed."""

from __future__ import annotations

from rich.console import Console
from rich.segment import Segment

from launcher.status import state
from launcher.status.logs import attempts
from launcher.status.state import RunStatus
from launcher.status.terminal import PIPE_WIDTH, columns_of, plain


class Plain(Console):
    """Shows text of others as it stands: "[red]" is no colour, an escape no command of the
    terminal."""

    def __init__(self):
        super().__init__(highlight=False, soft_wrap=True, markup=False, emoji=False)

    def render(self, renderable, options=None):
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(plain(segment.text), segment.style)


def console() -> Console:
    """Wide enough for one line a stage when the output is a file or a pipe."""
    made = Plain()
    made.width = columns_of(made.width) if made.is_terminal else max(made.width, PIPE_WIDTH)
    return made


def failures(seen: RunStatus, stages: list[str]) -> list[str]:
    """For each stage that did not end well: its cause, what to do about it, and where its log
    is."""
    run, said = seen.run, []
    for row in seen.stages:
        if row.stage in stages and row.state in state.BAD:
            logs = attempts(run, row.stage)
            advice = f"  do: {row.advice}\n" if row.advice else ""
            said.append(
                f"{row.stage} {row.state_word}: {row.why}\n{advice}  log: "
                f"{logs[-1] if logs else run.stage(row.stage) / 'logs'}\n"
                f"  then: python -m launcher resume {run.folder}"
            )
    return said
