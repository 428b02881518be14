"""``python -m launcher.supervise RUN STAGE``: run one stage inside its job, outside its ranks.

Checks the parents' manifests, starts the ranks, passes USR1 and TERM on to them, and turns how they ended into DONE.json, another
attempt, or a failure with its cause. The exit code is the stage's: 0 done, 75 queued again, others failed.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from launcher import manifest, nccl, probe
from launcher.config import build_plain
from launcher.manifest import Refused
from launcher.pipeline import STAGES, Stage
from launcher.ranks import SAVED, Ending, LocalRanks, Log, SlurmRanks, stage_command
from launcher.run import Busy, Run, lock, this_process
from training.config import ConfigError

CANCELLED = 143
"""Exit code after a TERM: 128 + SIGTERM."""


class Supervisor:
    """One stage of one run; ``job`` is the Slurm job that it runs in, None without Slurm."""

    def __init__(self, run: Run, stage: Stage, job: int | None):
        self.run, self.stage, self.job = run, stage, job
        self.config = run.config
        self.attempt = run.status(stage.name)["attempt"]
        self.ranks: LocalRanks | SlurmRanks | None = None
        self.signals: list[int] = []

    def main(self) -> int:
        """Attempts until the stage is done, has failed or waits in the queue again; returns the exit code."""
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.on_signal)
        if self.job:
            self.claim_job()
        try:
            if self.is_done():
                return 0
            for parent in self.stage.parents:
                manifest.verify(self.run, STAGES[parent])
            while True:
                state, cause, code = self.one_attempt()
                self.end(state, cause)
                if state != "requeued":
                    return code
                if self.job:
                    return self.requeue()
        except (Refused, probe.SlurmError) as error:
            self.end("failed", str(error))
            return 1

    def is_done(self) -> bool:
        """True when there is nothing to do; raises Refused when the parents changed since this stage was done."""
        if not (self.run.stage(self.stage.name) / "DONE.json").exists():
            return False
        if manifest.left(self.run, [self.stage]):
            raise Refused(f"{self.stage.name} was done from other parents than there are now; "
                          f"python -m launcher resume {self.run.folder} moves it aside and runs it again")
        say(f"{self.stage.name} is already done: nothing to do")
        return True

    def one_attempt(self) -> tuple[str, str, int]:
        """Run the ranks once; (state, cause, exit code)."""
        self.attempt += 1
        folder, resources = self.run.stage(self.stage.name), getattr(build_plain("resources", self.config["resources"]), self.stage.name)
        log = Log(folder / "logs" / f"attempt_{self.attempt}.log")
        started, before = time.time(), self.run.iteration(self.stage.name)
        identity = {"attempt": self.attempt, "job": self.job, **this_process()}
        self.run.write_status(self.stage.name, state="running", cause="", started=started, ended=None, iteration=before, **identity)
        self.run.record("started", stage=self.stage.name, iteration=before, **identity)
        say(f"{self.stage.name} attempt {self.attempt}: {resources.nodes} node(s) x {resources.ranks_per_node} rank(s), log {log.path}")
        lines = nccl.environment(self.config["profile"], resources.ranks)
        for name, value, reason in lines:
            log.write("launcher", f"{name}={value}  # {reason}")
        environment = {name: value for name, value, _ in lines}
        command = stage_command(self.stage.module, folder / "config.json")
        if self.job:
            self.ranks = SlurmRanks(log, command, resources.nodes, resources.ranks_per_node, environment)
        else:
            self.ranks = LocalRanks(log, command, resources.ranks, environment)
        for number in self.signals:  # came before there was a rank to pass it on to
            self.ranks.pass_on(number)
        ending = self.ranks.wait()
        return self.classify(ending, before, started)

    def classify(self, ending: Ending, before: int | None, started: float) -> tuple[str, str, int]:
        """What follows from how the ranks ended: (state, cause, exit code)."""
        after = self.run.iteration(self.stage.name)
        if ending.code == 0:
            try:
                manifest.write(self.run, self.stage, manifest.make(self.run, self.stage, self.attempt, started))
            except Refused as refused:
                return "failed", str(refused), 1
            return "done", "", 0
        if signal.SIGTERM in self.signals and not self.preempted():
            return "cancelled", f"told to stop (SIGTERM); last checkpoint: iteration {after}", CANCELLED
        if ending.code == SAVED:
            if (after or 0) > (before or 0):
                return "requeued", f"saved iteration {after} and goes on", SAVED
            return "failed", f"no progress: the attempt began and ended at iteration {before}; it would do so again", 1
        cause = ending.cause()
        if signal.SIGUSR1 in self.signals:
            cause = f"reached its time limit and ended without saving ({cause}); raise resources.{self.stage.name}.minutes"
        return "failed", cause, ending.code if ending.code > 0 else 128 - ending.code

    def preempted(self) -> bool:
        """After a TERM: is this job still running for Slurm? Then only its tasks were told to make room, and it may queue itself again."""
        return self.job is not None and probe.call("squeue", "-h", "-j", str(self.job), "-o", "%T").strip() == "RUNNING"

    def requeue(self) -> int:
        """Put this job back into the queue; Slurm then ends it and starts it again under the same id."""
        probe.call("scontrol", "requeue", str(self.job))
        return SAVED

    def end(self, state: str, cause: str) -> None:
        name = self.stage.name
        iteration = self.run.iteration(name)
        self.run.write_status(name, state=state, cause=cause, ended=time.time(), iteration=iteration, attempt=self.attempt, job=self.job)
        self.run.record(state, stage=name, attempt=self.attempt, cause=cause, iteration=iteration, job=self.job)
        say(f"{name} {state}{f': {cause}' if cause else ''}")

    def claim_job(self) -> None:
        """Mark this job as ours in the queue: one submitted by hand from slurm/<stage>.sbatch does not carry the run's id yet."""
        try:
            probe.call("scontrol", "update", f"jobid={self.job}", f"comment={probe.comment(self.run.id, self.stage.name)}",
                       f"name={self.run.id}.{self.stage.name}")
        except probe.SlurmError as error:
            say(f"could not mark job {self.job} as this run's ({error}); status will not find it in the queue")

    def on_signal(self, number: int, _frame) -> None:
        """USR1 (time limit ahead) and TERM reach the ranks, which save at the step's end and exit 75."""
        say(f"{signal.Signals(number).name} received: the ranks are told to save")
        # under Slurm slurmd has sent the TERM to the tasks too, and srun would take one as an order to kill them
        number = signal.SIGTERM if number == signal.SIGINT else signal.Signals(number)
        self.signals.append(number)
        if self.ranks:
            self.ranks.pass_on(signal.SIGUSR1 if self.job else number)


def say(text: str) -> None:
    print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}", flush=True)


def main(arguments: list[str]) -> int:
    """Exit code of the stage; 64 for bad arguments, 1 where another process runs the same stage."""
    if len(arguments) != 2 or arguments[1] not in STAGES:
        print(f"usage: python -m launcher.supervise RUN STAGE, with STAGE one of {', '.join(STAGES)}", file=sys.stderr)
        return os.EX_USAGE
    name = arguments[1]
    try:
        run = Run.open(Path(arguments[0]))
        run.check_here()
        with lock(run.stage(name) / ".lock"):
            return Supervisor(run, STAGES[name], int(os.environ["SLURM_JOB_ID"]) if "SLURM_JOB_ID" in os.environ else None).main()
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return os.EX_USAGE
    except Busy as error:
        print(f"error: {name} is running already: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
