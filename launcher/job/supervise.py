"""``python -m launcher.job.supervise RUN STAGE``: run one stage inside its job, outside its ranks.

The supervisor checks the parents' manifests, the stage's own last checkpoint and the nodes. It
starts the ranks and tells them to save in time. When they have ended, it goes through four files:
what Slurm did (slurm_action.py), how the attempt ended (outcome.py), what follows (requeue.py), and
the way back into the queue (back_to_queue.py). The exit code is the stage's: 0 done, 75 queued
again, others failed.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from launcher.config import key_file
from launcher.config.sections import SECTIONS, build_plain
from launcher.config.stages import NAMES, Stage
from launcher.estimates import memory
from launcher.job import back_to_queue, deadline, outcome, preflight, requeue, stage_folder
from launcher.job.attempt import Attempt
from launcher.job.outcome import EXIT_STOPPED, AttemptFacts, Outcome, OutcomeKind, RankExit, classify
from launcher.job.rank_log import LINES, Log
from launcher.job.ranks import LocalRanks, SlurmRanks, job_port, stage_command
from launcher.job.slurm_action import restarted_after_loss
from launcher.run import manifest
from launcher.run.folder import Busy, Run, lock, this_process, write_text
from launcher.run.manifest import Refused
from launcher.slurm import commands, network
from training.config.schema import load, usage
from training.config.shape import Shape
from training.errors import ConfigError

RESERVE_BYTES = 256 * 1024
"""Size of a file that the supervisor deletes at the end: then its last words find room on a disk
that the stage has filled."""
LOCK_S = 900
"""Seconds for which a job waits for an earlier one of the same stage that its node or controller
has forgotten to end."""


class Supervisor:
    """One stage of one run; ``job`` is the Slurm job that it runs in, None without Slurm."""

    def __init__(self, run: Run, stage: Stage, job: int | None):
        self.run, self.stage, self.job = run, stage, job
        self.config, self.profile = run.config, run.profile
        self.resources = getattr(build_plain("resources", self.config["resources"]), stage.name)
        self.number, self.began = run.status(stage.name)["attempt"], time.time()
        self.attempt = self.new_attempt()
        self.before: int | None = None
        self.done_before = 0
        self.reserves = (run.stage(stage.name) / ".reserve", run.folder / ".reserve")

    def new_attempt(self) -> Attempt:
        lead_s = min(self.profile.signal_lead_s, self.resources.minutes * 15)
        return Attempt(self.run, self.stage, self.job, self.profile.stall_minutes, lead_s, log_line)

    def main(self) -> int:
        """Attempts until the stage is done, has failed or waits in the queue again; returns the
        exit code."""
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.on_signal)
        if self.job in self.run.disowned():
            log_line(f"job {self.job} was declared dead by resume --take-over: it leaves the run as it is")
            return 1
        try:
            if self.job:
                self.claim_job()
            if self.is_done():
                return 0
            self.record_lost_attempt()
            while True:
                state, code = self.follow(self.one_attempt())
                if state != "requeued" or self.job:
                    return code
                self.attempt = self.new_attempt()
        except Exception as error:
            return self.end("failed", self.failure(error))

    def failure(self, error: Exception) -> Outcome:
        """The supervisor can't go on: what it checks is wrong, the disk is full, or this is a
        bug."""
        kind = outcome.kind_of_error(error)
        if isinstance(error, Refused | ConfigError | commands.SlurmError):
            return Outcome(kind, str(error))
        if self.attempt.ranks:
            self.attempt.ranks.send_signal(signal.SIGKILL)
        lines = traceback.format_exc().rstrip().split("\n")
        log_line("\n".join(lines))
        log = f"slurm-{commands.own_job(self.job)}.out" if self.job else "supervise.log"
        path = self.run.stage(self.stage.name) / "logs" / log
        return Outcome(
            kind,
            f"the supervisor: {' '.join(lines[-1].split())}; its log: {path}",
            lines=tuple(lines[-LINES:]),
            code=os.EX_IOERR if kind is OutcomeKind.DISK_FULL else 1,
        )

    def create_reserves(self) -> None:
        """Files that the supervisor deletes where the disk is full, so that its last words find
        room."""
        for path in self.reserves:
            with contextlib.suppress(OSError):
                path.write_bytes(b"." * RESERVE_BYTES)

    def is_done(self) -> bool:
        """True when there is nothing to do; raises Refused when the parents changed since this
        stage was done."""
        if not (self.run.stage(self.stage.name) / "DONE.json").exists():
            return False
        if manifest.left(self.run, [self.stage]):
            raise Refused(
                f"{self.stage.name} was done from other parents than there are now; "
                f"python -m launcher resume {self.run.folder} moves it aside and runs it again"
            )
        log_line(f"{self.stage.name} is already done: nothing to do")
        return True

    def record_lost_attempt(self) -> None:
        """Write the end of an attempt that was killed with its supervisor (node, kill -9,
        KillWait)."""
        status = self.run.status(self.stage.name)
        ended_attempts = {
            event["attempt"]
            for event in self.run.ledger()
            if event.get("stage") == self.stage.name and event["event"] != "started" and "attempt" in event
        }
        if not status["attempt"] or status["attempt"] in ended_attempts:
            return
        lost = outcome.of_lost_attempt(status, restarted_after_loss(self.job, status))
        self.run.record(
            requeue.VANISHED,
            stage=self.stage.name,
            attempt=status["attempt"],
            job=status.get("job"),
            began=status.get("began"),
            iteration=self.run.iteration(self.stage.name),
            cause=lost.cause,
            **{"class": lost.kind.value},
        )

    def one_attempt(self) -> Outcome:
        """Check what the ranks need, run them once, and find the outcome."""
        self.begin_attempt()
        if (self.run.folder / "STOP").exists():
            cause = "the file STOP is in the run folder: nothing was started"
            return Outcome(OutcomeKind.STOPPED, cause, code=EXIT_STOPPED)
        for parent in self.stage.parents:
            manifest.verify(self.run, self.run.stages[parent], self.stage.name)
        keys = key_file.read(self.profile.secrets) if self.profile.secrets else {}
        log = Log(self.run.stage(self.stage.name) / "logs" / f"attempt_{self.number}.log", keys)
        log_line(
            f"{self.stage.name} attempt {self.number}: {self.resources.nodes} node(s) x "
            f"{self.resources.ranks_per_node} rank(s), log {log.path}"
        )
        environment = self.rank_environment(log)
        if self.job:
            return self.run_slurm_ranks(log, environment)
        return self.wait_and_classify(LocalRanks(log, self.command(), self.resources.ranks, environment))

    def begin_attempt(self) -> None:
        """Go on from the newest intact checkpoint, and write that an attempt runs."""
        name, folder = self.stage.name, self.run.stage(self.stage.name)
        self.create_reserves()
        self.number, self.began = self.number + 1, time.time()
        # ranks of an earlier attempt that still live save no more
        write_text(folder / ".attempt", f"{self.number}\n")
        for iteration, reason in stage_folder.quarantine_damaged(self.run, self.stage).items():
            log_line(f"checkpoint {iteration} is damaged and moved aside: {reason}")
        self.before, self.done_before = self.run.iteration(name), stage_folder.work_done(self.run, self.stage)
        identity = {"attempt": self.number, "job": self.job, **this_process()}
        self.run.write_status(
            name,
            state="running",
            cause="",
            started=self.began,
            ended=None,
            iteration=self.before,
            began=self.before,
            rank=None,
            lines=[],
            advice="",
            **identity,
            **{"class": ""},
        )
        self.run.record("started", stage=name, iteration=self.before, **identity)

    def rank_environment(self, log: Log) -> dict[str, str]:
        """The variables that all ranks get; the log names those of the network."""
        variables = network.environment(self.profile, self.resources.ranks_per_node)
        for variable, value, reason in variables:
            log.write("launcher", f"{variable}={value}  # {reason}")
        return {
            **self.compile_caches(),
            **{variable: value for variable, value, _ in variables},
            **log.secrets,
            "CONVOY_ATTEMPT": str(self.number),
            "CONVOY_WORDS": str(log.report_folder.absolute()),
        }

    def command(self) -> list[str]:
        return stage_command(self.stage.module, self.run.stage(self.stage.name) / "config.json")

    def run_slurm_ranks(self, log: Log, environment: dict[str, str]) -> Outcome:
        """Check the nodes of this allocation, and run the ranks on the good ones."""
        hosts = preflight.hosts(self.resources)
        if self.profile.preflight:
            report = preflight.run(self.run, self.stage, self.profile, self.resources, hosts, environment, log)
            # the checks were cut off: no node is to blame
            if (report.bad or report.outcome) and not self.still_running():
                return self.interrupted()
            for node, reason in report.bad.items():
                log_line(f"bad node {node}: {reason}")
                self.run.record("bad node", stage=self.stage.name, node=node, reason=reason, job=self.job)
            if report.outcome:
                return report.outcome
            hosts = report.good
        hosts = hosts[: self.resources.nodes]
        environment = {"MASTER_ADDR": preflight.address(hosts[0]), **environment}
        environment["MASTER_PORT"] = str(job_port(self.job, os.environ.get("SLURMD_NODENAME") == hosts[0]))
        ranks = SlurmRanks(log, self.command(), hosts, self.resources.ranks_per_node, environment, self.profile)
        return self.wait_and_classify(ranks)

    def compile_caches(self) -> dict[str, str]:
        """Variables that name the folders of compiled kernels.

        They are in the run folder, for the next attempt and the next stage, on all nodes alike
        (torch and Triton write a temporary file and rename it). A variable of the job's environment
        or of the profile's ``environment`` stays as it is.
        """
        folders = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton"}
        return {
            name: str(self.run.folder.absolute() / "compiled" / folder)
            for name, folder in folders.items()
            if name not in os.environ
        }

    def still_running(self) -> bool:
        """Whether this job still runs, and neither Slurm nor a person told it to end. Slurm may end
        a step a moment before it tells the supervisor."""
        try:
            self.attempt.terminated |= deadline.ask(self.job).state != "RUNNING"
        except commands.SlurmError:
            time.sleep(1)
        return not (self.attempt.stop_reason or self.attempt.terminated)

    def interrupted(self) -> Outcome:
        """The outcome of an attempt that was told to end before its ranks started."""
        self.attempt.settle_slurm_action([])
        return classify(self.facts([], None))

    def wait_and_classify(self, ranks: LocalRanks | SlurmRanks) -> Outcome:
        """Wait for the ranks, and find the outcome."""
        exits = self.attempt.wait(ranks)
        if not exits:
            return self.write_manifest(ranks.log.report_folder)
        self.attempt.settle_slurm_action(exits)  # a TERM may have ended the ranks before its reason was known
        after = self.run.iteration(self.stage.name) if self.stage.checkpoints else None
        return self.with_memory_advice(classify(self.facts(exits, after)))

    def facts(self, exits: list[RankExit], after: int | None) -> AttemptFacts:
        action = self.attempt.slurm_action
        return AttemptFacts(
            self.stage.name,
            exits,
            self.attempt.srun_lines(),
            self.attempt.stop_reason,
            action.kind if action else None,
            self.attempt.hung_minutes,
            self.before,
            after,
        )

    def write_manifest(self, report_folder: Path) -> Outcome:
        """DONE.json of a stage whose ranks all exited 0."""
        versions = report_folder / manifest.VERSIONS
        try:
            content = manifest.make(self.run, self.stage, self.number, self.began, versions)
        except Refused as error:
            return Outcome(outcome.kind_of_manifest_error(error), str(error))
        manifest.write(self.run, self.stage, content)
        return Outcome(OutcomeKind.DONE, "", code=0)

    def with_memory_advice(self, result: Outcome) -> Outcome:
        """After GPU memory ran out: the outcome with the settings that would free some, and how
        much."""
        if result.kind is not OutcomeKind.CUDA_OOM or not self.stage.trainer:
            return result
        try:
            config = load(SECTIONS[self.stage.name], self.run.stage(self.stage.name) / "config.json")
            shape = Shape.read(config.paths.model)
            advice = memory.relief(self.stage.name, shape, config, self.resources, self.profile)
        except (ConfigError, OSError) as error:
            log_line(f"no estimate of the memory: {error}")
            return result
        return replace(result, memory_advice=advice)

    def follow(self, result: Outcome) -> tuple[str, int]:
        """Decide what follows the attempt, write it to status and ledger, and do it: (state, exit
        code)."""
        action = self.attempt.slurm_action
        state, result = requeue.decide(
            result,
            requeue.history_of(self.run.ledger(), self.stage.name),
            self.stage,
            self.profile.max_attempts,
            requeue.AttemptProgress(self.moved(), self.before),
            action,
            cancelled=self.job is not None and self.run.cancelled_since(self.began, self.job),
        )
        code = self.end(state, result)  # written first: Slurm ends this job at once
        if state == "requeued" and self.job and not (action and action.requeued):
            try:
                needed = self.resources.nodes + self.resources.spares
                back_to_queue.requeue(self.job, preflight.bad_nodes(self.run, self.job), needed, log_line)
            except commands.SlurmError as error:
                cause = f"{result.cause}; Slurm did not queue it again: {error}"
                return "failed", self.end("failed", replace(result, cause=cause, code=1))
        return state, code

    def moved(self) -> bool:
        """Whether this attempt got anything done."""
        return stage_folder.work_done(self.run, self.stage) > self.done_before

    def end(self, state: str, result: Outcome) -> int:
        """Write how the attempt ended; the exit code."""
        name = self.stage.name
        shared = {
            "cause": result.cause,
            "iteration": self.run.iteration(name),
            "attempt": self.number,
            "job": self.job,
            "class": result.kind.value,
        }
        advice = "" if state in ("done", "requeued") else result.advice(name)
        status = {
            "state": state,
            "ended": time.time(),
            "advice": advice,
            "rank": result.rank,
            "lines": list(result.lines),
            **shared,
        }
        moved = self.moved()
        self.write_last_words(lambda: self.run.write_status(name, **status))
        self.write_last_words(lambda: self.run.record(state, stage=name, began=self.before, moved=moved, **shared))
        with contextlib.suppress(OSError):
            self.reserves[0].unlink()
        log_line(f"{name} {state}{f': {result.cause}' if result.cause else ''}")
        return result.code

    def write_last_words(self, write: Callable[[], None]) -> None:
        """Write; where the disk is full, delete the reserves one by one."""
        for path in (*self.reserves, None):
            try:
                return write()
            except OSError as error:
                log_line(f"{error}{f'; {path} is given up' if path else ''}")
                with contextlib.suppress(OSError):
                    path and path.unlink()

    def claim_job(self) -> None:
        """Mark this job as ours in the queue: one submitted by hand from slurm/<stage>.sbatch does
        not carry the run's id yet."""
        name = f"{self.run.id}.{self.stage.name}"
        if "sweep" in self.config["run"] or os.environ.get("SLURM_JOB_NAME") == name:
            # it carries the run's id already, or its array's, and its comment the submission's
            # token
            return
        try:
            commands.call(
                "scontrol",
                "update",
                f"jobid={self.job}",
                f"name={name}",
                f"comment={commands.comment(self.run.id, self.stage.name)}",
            )
        except commands.SlurmError as error:
            log_line(f"could not mark job {self.job} as this run's ({error}); status will not find it in the queue")

    def on_signal(self, number: int, _frame) -> None:
        """USR1 (time limit ahead), TERM and Ctrl-C."""
        log_line(f"{signal.Signals(number).name} received")
        self.attempt.on_signal(signal.SIGTERM if number == signal.SIGINT else number)


def log_line(text: str) -> None:
    now = time.time()
    stamp = f"{time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(now))}.{int(now * 1000) % 1000:03d}"
    # the log's disk is full; a signal came in the middle of a line
    with contextlib.suppress(OSError, RuntimeError):
        print(f"{stamp} {text}", flush=True)


@contextlib.contextmanager
def lock_when_free(path: Path, seconds: float):
    """``lock(path)``, waiting for its holder for so many seconds: an orphan of a lost slurmd or
    controller may be about to finish."""
    deadline_s, logged = time.monotonic() + seconds, False
    with contextlib.ExitStack() as stack:
        while True:
            try:
                stack.enter_context(lock(path))
                break
            except Busy:
                if time.monotonic() > deadline_s:
                    raise
            if not logged:
                log_line(f"another process holds {path}: it is waited for, at most {seconds:.0f} s")
                logged = True
            time.sleep(0.5)
        yield


def main(arguments: list[str]) -> int:
    """Exit code of the stage; 64 for bad arguments, 1 where another process runs the same stage."""
    if {"-h", "--help"} & set(arguments):
        return usage(arguments, "launcher.job.supervise", "RUN STAGE", __doc__)
    if len(arguments) != 2 or arguments[1] not in NAMES:
        print(
            f"usage: python -m launcher.job.supervise RUN STAGE, with STAGE one of {', '.join(NAMES)}", file=sys.stderr
        )
        return os.EX_USAGE
    name = arguments[1]
    try:
        run = Run.open(Path(arguments[0]))
        run.check_here()
        job = int(os.environ["SLURM_JOB_ID"]) if "SLURM_JOB_ID" in os.environ else None
        with lock_when_free(run.stage(name) / ".lock", LOCK_S if job else 0):
            return Supervisor(run, run.stage_named(name), job).main()
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return os.EX_USAGE
    except Busy as error:
        print(f"error: {name} is running already: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
