"""What a scenario works with: a project with stub stages on a cluster, a clock from the fault to
its notice, and the final account."""

from __future__ import annotations

import collections
import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tests.slurm.cluster import Cluster
from tests.support.stub_project import ROOT, Project, wait_until

TRAINERS = ("sft", "reward", "rlhf")
PATIENCE = 3
"""Limits are for a machine with nothing else to do; waiting longer costs nothing where all is
well."""
SCENARIOS: dict[str, Scenario] = {}


class Skipped(RuntimeError):
    """This fault can't be injected here; the message says why."""


@dataclass(frozen=True)
class Scenario:
    name: str
    fault: str
    """A row's first column."""
    run: Callable[[Case], str]
    """Injects the fault, asserts what follows, returns the outcome in words."""
    slow: bool
    cluster: dict | None
    """Options of a cluster of its own; None: on the shared one, which it must not break."""
    seconds: float
    """About how long it takes: the long ones are started first."""


def scenario(fault: str, *, slow: bool = False, cluster: dict | None = None, seconds: float = 10):
    def register(function: Callable[[Case], str]) -> Callable[[Case], str]:
        name = function.__name__.replace("_", "-")
        SCENARIOS[name] = Scenario(name, fault, function, slow, cluster, seconds)
        return function

    return register


@dataclass
class Case:
    """One run of one scenario."""

    cluster: Cluster
    folder: Path
    noticed_s: float | None = None
    """Seconds from the fault to its first trace in what the user sees."""
    mounts: list[Path] = field(default_factory=list)

    def __post_init__(self):
        self.folder.mkdir(parents=True)
        self.project = Project(self.folder, self.cluster.environment)
        self.run = self.project.run
        self.injected = time.monotonic()

    # what a user does

    def submit(self, *arguments: str, profile: str = "dev", sets: dict | None = None) -> None:
        words = [word for key, value in (sets or {}).items() for word in ("--set", f"{key}={value}")]
        self.check(self.project.submit(*arguments, *words, profile=profile))

    def resume(self, *arguments: str) -> None:
        self.check(self.project.convoy("resume", "demo", *arguments))

    @staticmethod
    def check(done: subprocess.CompletedProcess) -> None:
        assert done.returncode == 0, f"{done.args[2:]}: {done.stdout}{done.stderr}"

    def profile(self, **values: str) -> str:
        """The dev profile with some lines changed."""
        text = (ROOT / "slurm/clusters/dev.toml").read_text()
        kept = [line for line in text.splitlines() if line.split(" = ")[0] not in values]
        path = self.folder / "site.toml"
        path.write_text("\n".join([*kept, *(f"{key} = {value}" for key, value in values.items())]) + "\n")
        return str(path)

    # the clock

    def inject(self) -> None:
        self.injected, self.noticed_s = time.monotonic(), None

    def notice(self, condition: Callable[[], object], seconds: float, what: str) -> None:
        """Wait until the fault shows; the first call after ``inject`` sets the clock."""
        self.until(condition, seconds, what)
        if self.noticed_s is None:
            self.noticed_s = time.monotonic() - self.injected

    def until(self, condition: Callable[[], object], seconds: float, what: str) -> None:
        try:
            wait_until(condition, PATIENCE * seconds, what)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.told()}") from None

    # what there is to see

    def status(self, stage: str) -> dict:
        path = self.run / stage / "status.json"
        return json.loads(path.read_text()) if path.exists() else {"state": "", "cause": "", "attempt": 0}

    def state(self, stage: str) -> str:
        return self.status(stage)["state"]

    def row(self, stage: str) -> dict:
        """What ``status`` says of a stage."""
        return self.project.states()[stage]

    def has(self, path: str) -> bool:
        return (self.run / path).exists()

    def jobs(self) -> dict[str, str]:
        """Stage -> state of the newest job that carries this run's id."""
        return {stage: state for stage, (_, state) in self._queue().items()}

    def job(self, stage: str) -> str:
        return str(self._queue()[stage][0])

    def _queue(self) -> dict[str, tuple[int, str]]:
        identity, found = self.project.json("config.json")["run"]["id"], {}
        for line in self.cluster.call("squeue", "-h", "-t", "all", "-o", "%A|%T|%k").splitlines():
            number, state, comment = line.split("|", 2)
            stage = comment.rpartition("stage=")[2]
            if f"run={identity} " in comment and (stage not in found or int(number) > found[stage][0]):
                found[stage] = (int(number), state)
        return found

    def idle(self) -> bool:
        """Nothing of this run is queued or runs."""
        return not {"PENDING", "RUNNING", "COMPLETING", "SUSPENDED"} & set(self.jobs().values())

    def rank(self, stage: str, rank: int) -> dict:
        return self.project.json(f"{stage}/rank_{rank}.json")

    def begun(self, stage: str, iteration: int = 1) -> None:
        """Wait until a stage has saved this iteration."""
        latest = self.run / stage / "latest"
        self.until(
            lambda: latest.exists() and int(latest.read_text()) >= iteration, 60, f"{stage} at iteration {iteration}"
        )

    # how it must end

    def done(self, *stages: str, seconds: float = 60, again: str = "") -> None:
        """Wait until these stages are DONE; fails at once when one has failed and nothing of the
        run is queued. ``again``: see ``once``."""

        def ended() -> bool:
            left = [stage for stage in stages if not self.has(f"{stage}/DONE.json")]
            failed = [stage for stage in left if self.state(stage) in ("failed", "cancelled", "stopped")]
            assert not failed or not self.idle(), f"{failed} instead of done\n{self.told()}"
            return not left

        self.until(ended, seconds, f"{', '.join(stages)} DONE")
        self.once(*stages, again=again)

    def fails(self, stage: str, *words: str, seconds: float = 30, states: tuple[str, ...] = ("failed",)) -> str:
        """Wait until a stage has failed; its cause must hold ``words``. Returns the cause. Its
        children must not have run."""
        self.notice(lambda: self.state(stage) in states, seconds, f"{stage} {' or '.join(states)}")
        cause = self.status(stage)["cause"]
        for word in words:
            assert word in cause, f"{word!r} is not in the cause {cause!r}\n{self.told()}"
        self.until(self.idle, 20, "nothing of the run queued")
        return f"{self.state(stage)}: {cause}"

    def executed(self) -> dict[tuple[str, str], collections.Counter]:
        """(run, stage) -> how often each iteration got into a checkpoint; stages that don't train
        have iteration 0."""
        path, found = self.folder / "executed.jsonl", collections.defaultdict(collections.Counter)
        for row in map(json.loads, path.read_text().splitlines() if path.exists() else []):
            found[row["run"], row["stage"]][row["iteration"]] += 1
        return found

    def once(self, *stages: str, run: str = "demo", again: str = "") -> None:
        """Nothing lost, nothing run twice: of each stage every iteration was executed and saved
        once, and no stage ran that should not.

        ``again``: a stage that saves nothing on its way, and may have been killed after its work
        but before its supervisor said DONE.
        """
        executed = self.executed()
        if (run, again) in executed:
            executed[run, again] = collections.Counter(executed[run, again].keys())
        for stage in stages:
            wanted = self.project.json(f"../{run}/{stage}/config.json")["iterations"] if stage in TRAINERS else 0
            expected = collections.Counter(range(1, wanted + 1) if wanted else [0])
            assert executed[run, stage] == expected, f"{stage} executed {executed[run, stage]}\n{self.told()}"
        ran_twice = {key: counts for key, counts in executed.items() if any(count > 1 for count in counts.values())}
        assert not ran_twice, f"{ran_twice}\n{self.told()}"

    def told(self) -> str:
        """What the run and the queue say: for a failed assertion."""
        lines = [f"folder {self.folder}"]
        if (self.run / "ledger.jsonl").exists():
            lines += (self.run / "ledger.jsonl").read_text().splitlines()
        for path in sorted(self.run.glob("*/logs/*")):
            lines += [f"--- {path.relative_to(self.run)}", *path.read_text(errors="replace").splitlines()[-12:]]
        queue = subprocess.run(
            ["squeue", "-t", "all", "-o", "%A %T %r %k"],
            env={**os.environ, **self.cluster.environment},
            capture_output=True,
            text=True,
        )
        return "\n".join([*lines, queue.stdout + queue.stderr])

    # disks

    def mount(self, path: Path, size: str) -> None:
        """A file system of its own at ``path``; Skipped without the right to mount."""
        path.mkdir(parents=True, exist_ok=True)
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size},mode=777", "convoy-chaos", str(path)],
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise Skipped(f"no right to mount a file system: {done.stderr.strip()}")
        self.mounts.append(path)

    def close(self, keep: bool = False) -> None:
        """Stop the run, unmount, and remove the folder unless it is to be kept."""
        if self.run.joinpath("config.json").exists():
            self.project.convoy("cancel", "demo")
        for path in self.mounts:
            while path.is_mount():  # a scenario may have mounted it over itself
                subprocess.run(["umount", "-l", str(path)], check=True)
        if not keep:
            shutil.rmtree(self.folder, ignore_errors=True)
