"""``python -m tests.slurm.chaos``: inject every fault into real chains on a real Slurm, and print
what came of it.

Scenarios are in tests/slurm/faults; those that leave the cluster whole share one, the others have a
small one of their own. They run side by side: most of their time is waiting. Exit code 1 when one
did not end as it should.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tests.slurm.cluster import Cluster
from tests.slurm.faults import SCENARIOS
from tests.slurm.faults.case import Case, Scenario, Skipped

WORKERS = 5
"""Scenarios at a time; two cores are busy with that."""
PAGE = Path(__file__).parents[2] / "docs/operations/faults.md"
COLUMNS = ("fault", "noticed after", "outcome")


@dataclass(frozen=True)
class Row:
    scenario: Scenario
    noticed_s: float | None
    outcome: str
    seconds: float
    """Of the whole scenario."""
    kind: str
    """passed, skipped or failed."""

    def cells(self) -> tuple[str, str, str]:
        noticed = "-" if self.noticed_s is None else f"{self.noticed_s:.1f} s"
        return (
            self.scenario.fault,
            noticed,
            self.outcome if self.kind == "passed" else f"{self.kind.upper()}: {self.outcome}",
        )


class Chaos:
    """``with Chaos(names) as chaos``: all run; ``chaos.rows[name].result()`` waits for one."""

    def __init__(self, names: list[str], keep: bool = False):
        self.folder = Path(tempfile.mkdtemp(prefix="convoy-chaos-"))
        self.keep, self.shared, self.lock = keep, None, threading.Lock()
        self.pool = ThreadPoolExecutor(WORKERS)
        first = sorted(names, key=lambda name: -SCENARIOS[name].seconds)
        self.rows: dict[str, Future[Row]] = {name: self.pool.submit(self._one, SCENARIOS[name]) for name in first}

    def __enter__(self) -> Chaos:
        return self

    def __exit__(self, *_ended) -> None:
        self.pool.shutdown(cancel_futures=True)
        if self.shared:
            self.shared.__exit__()
        if not self.keep:
            subprocess.run(["rm", "-rf", "--one-file-system", str(self.folder)], check=True)

    def _one(self, scenario: Scenario) -> Row:
        began = time.monotonic()
        try:
            if scenario.cluster is None:
                return self._on(scenario, self._shared(), began)
            from tests.slurm.faults.controller import needs_accounting

            if scenario.cluster.get("ACCOUNTING"):
                needs_accounting()
            with Cluster(**scenario.cluster) as cluster:
                return self._on(scenario, cluster, began)
        except Skipped as reason:
            return Row(scenario, None, str(reason), time.monotonic() - began, "skipped")

    def _on(self, scenario: Scenario, cluster: Cluster, began: float) -> Row:
        case = Case(cluster, self.folder / scenario.name)
        try:
            outcome, kind = scenario.run(case), "passed"
        except (AssertionError, OSError, LookupError, ValueError, subprocess.SubprocessError) as error:
            outcome, kind = f"{type(error).__name__}: {error}", "failed"
        finally:
            case.close(keep=self.keep)
        return Row(scenario, case.noticed_s, outcome, time.monotonic() - began, kind)

    def _shared(self) -> Cluster:
        with self.lock:
            if self.shared is None:
                self.shared = Cluster().__enter__()
            return self.shared


def table(rows: list[Row], markdown: bool) -> str:
    """One line a fault, in the order of the list."""
    cells = [COLUMNS, *(tuple(text.splitlines()[0] if text else "" for text in row.cells()) for row in rows)]
    if markdown:
        lines = ["| " + " | ".join(text.replace("|", "\\|") for text in line) + " |" for line in cells]
        return "\n".join([lines[0], "|---|---|---|", *lines[1:]])
    widths = [max(len(line[column]) for line in cells) for column in range(2)]
    return "\n".join(f"{line[0]:{widths[0]}}  {line[1]:>{widths[1]}}  {line[2]}" for line in cells)


def table_span(text: str) -> tuple[int, int]:
    """Where the table starts and ends in the page of faults."""
    start = text.index("| " + " | ".join(COLUMNS) + " |")
    return start, text.index("\n\n", start)


def updated(text: str, rows: list[Row]) -> str:
    """The page with the rows of faults that passed now; the rows of faults that did not run
    stay."""
    start, end = table_span(text)
    known = {line.split(" | ")[0].removeprefix("| "): line for line in text[start:end].split("\n")[2:]}
    for row in rows:
        if row.kind == "passed":
            line = table([row], markdown=True).split("\n")[2]
            known[line.split(" | ")[0].removeprefix("| ")] = line
    faults = [scenario.fault.replace("|", "\\|") for scenario in SCENARIOS.values()]
    lines = [*text[start:end].split("\n")[:2], *(known[fault] for fault in faults if fault in known)]
    return text[:start] + "\n".join(lines) + text[end:]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.slurm.chaos", description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--only", action="append", choices=sorted(SCENARIOS), metavar="NAME", help="this scenario; may be repeated"
    )
    parser.add_argument("--slow", action="store_true", help="also those that wait for a true time limit (4 minutes)")
    parser.add_argument("--markdown", action="store_true", help="the table as Markdown")
    parser.add_argument("--docs", action="store_true", help="write what passed into docs/operations/faults.md")
    parser.add_argument("--keep", action="store_true", help="keep the scenarios' folders")
    asked = parser.parse_args()
    names = asked.only or [name for name, scenario in SCENARIOS.items() if asked.slow or not scenario.slow]
    began = time.monotonic()
    with Chaos(names, asked.keep) as chaos:
        rows = []
        for name in names:
            rows.append(chaos.rows[name].result())
            print(f"{name}: {rows[-1].kind} in {rows[-1].seconds:.0f} s", file=sys.stderr)
    print(table(rows, asked.markdown))
    if asked.docs:
        PAGE.write_text(updated(PAGE.read_text(encoding="utf-8"), rows), encoding="utf-8")
    for row in rows:
        if row.kind == "failed":
            print(f"\n=== {row.scenario.name}\n{row.outcome}", file=sys.stderr)
    print(f"{len(rows)} faults in {time.monotonic() - began:.0f} s on {os.cpu_count()} cores", file=sys.stderr)
    return 1 if any(row.kind == "failed" for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
