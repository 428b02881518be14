"""``python -m launcher.job.supervise RUN STAGE``: run one stage inside its job, outside its ranks.

Checks the parents' manifests, the stage's own last checkpoint and the nodes, starts the ranks,
tells them to save in time, and turns how they ended into DONE.json, another attempt, or a failure
with its cause. The exit code is the stage's: 0 done, 75 queued again, others failed.
"""

from __future__ import annotations

import contextlib
import errno
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
from launcher.job import deadline, preflight, requeue
from launcher.job.attempt import Attempt
from launcher.job.endings import REASONS, Class, Facts, Verdict, shown
from launcher.job.outcome import classify
from launcher.job.ranks import LINES, LocalRanks, Log, SlurmRanks, job_port, stage_command
from launcher.job.requeue import ENDED, VANISHED
from launcher.run import checkpoints, manifest
from launcher.run.folder import Busy, Run, lock, this_process, write_text
from launcher.run.manifest import Refused
from launcher.slurm import commands, network
from training.config.schema import load, usage
from training.config.shape import Shape
from training.errors import ConfigError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
RESERVE_BYTES = 256 * 1024
"""Size of a file that is given up at the end, so that the last words find room on a disk that the
stage has filled."""
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
        return Attempt(self.run, self.stage, self.job, self.profile.stall_minutes, lead_s, say)

    def main(self) -> int:
        """Attempts until the stage is done, has failed or waits in the queue again; returns the
        exit code."""
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.on_signal)
        if self.job in self.run.disowned():
            say(f"job {self.job} was declared dead by resume --take-over: it leaves the run as it is")
            return 1
        try:
            if self.job:
                self.claim_job()
            if self.is_done():
                return 0
            self.settle_unfinished()
            while True:
                verdict = self.one_attempt()
                state, code = self.follow(verdict)
                if state != "requeued" or self.job:
                    return code
                self.attempt = self.new_attempt()
        except Refused as error:
            return self.end("failed", Verdict(Class.REFUSED, str(error)))
        except (commands.SlurmError, ConfigError) as error:
            kind = Class.BAD_CONFIG if isinstance(error, ConfigError) else Class.SLURM
            return self.end("failed", Verdict(kind, str(error)))
        except Exception as error:
            return self.end("failed", self.own_failure(error))

    def own_failure(self, error: Exception) -> Verdict:
        """The supervisor can't go on: the disk is full, or this is a bug. Its ranks end with it."""
        if self.attempt.ranks:
            self.attempt.ranks.pass_on(signal.SIGKILL)
        lines = traceback.format_exc().rstrip().split("\n")
        say("\n".join(lines))
        number = error.errno if isinstance(error, OSError) else None
        kind = Class.DISK_FULL if number in FULL else Class.FILE_ERROR if number else Class.BUG
        log = f"slurm-{commands.own_job(self.job)}.out" if self.job else "supervise.log"
        path = self.run.stage(self.stage.name) / "logs" / log
        return Verdict(
            kind,
            f"the supervisor: {' '.join(lines[-1].split())}; its log: {path}",
            lines=tuple(lines[-LINES:]),
            code=os.EX_IOERR if kind is Class.DISK_FULL else 1,
        )

    def keep_reserves(self) -> None:
        """Files that are given up where the disk is full, so that the last words find room."""
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
        say(f"{self.stage.name} is already done: nothing to do")
        return True

    def settle_unfinished(self) -> None:
        """An attempt that was killed with its supervisor (node, kill -9, KillWait) could not say
        so; its end is noted now."""
        status = self.run.status(self.stage.name)
        known = {
            event["attempt"]
            for event in self.run.ledger()
            if event.get("stage") == self.stage.name and event["event"] != "started" and "attempt" in event
        }
        if not status["attempt"] or status["attempt"] in known:
            return
        again = self.job is not None and self.job == status.get("job")
        kind = status.get("class") or (Class.NODE_FAILURE.value if again else Class.KILLED.value)
        known = f"{status['cause']}; " if status.get("cause") else ""
        cause = f"{known}its supervisor was killed with it{f'; Slurm queued job {self.job} again' if again else ''}"
        self.run.record(
            VANISHED,
            stage=self.stage.name,
            attempt=status["attempt"],
            job=status.get("job"),
            began=status.get("began"),
            iteration=self.run.iteration(self.stage.name),
            cause=cause,
            **{"class": kind},
        )

    def one_attempt(self) -> Verdict:
        """Check what the ranks need, run them once, say how they ended."""
        name, folder = self.stage.name, self.run.stage(self.stage.name)
        self.keep_reserves()
        self.number, self.began = self.number + 1, time.time()
        # ranks of an earlier attempt that still live save no more
        write_text(folder / ".attempt", f"{self.number}\n")
        self.drop_damaged()
        self.before, self.done_before = self.run.iteration(name), requeue.work_done(self.run, self.stage)
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
        if (self.run.folder / "STOP").exists():
            return Verdict(Class.STOPPED, "the file STOP is in the run folder: nothing was started", code=ENDED)
        for parent in self.stage.parents:
            manifest.verify(self.run, self.run.stages[parent], name)
        keys = key_file.read(self.profile.secrets) if self.profile.secrets else {}
        log = Log(folder / "logs" / f"attempt_{self.number}.log", keys)
        say(
            f"{name} attempt {self.number}: {self.resources.nodes} node(s) x "
            f"{self.resources.ranks_per_node} rank(s), log {log.path}"
        )
        lines = network.environment(self.config["profile"], self.resources.ranks_per_node)
        for variable, value, reason in lines:
            log.write("launcher", f"{variable}={value}  # {reason}")
        environment = {
            **self.caches(),
            **{variable: value for variable, value, _ in lines},
            **keys,
            "CONVOY_ATTEMPT": str(self.number),
            "CONVOY_WORDS": str(log.left.absolute()),
        }
        command = stage_command(self.stage.module, folder / "config.json")
        if not self.job:
            return self.judge(LocalRanks(log, command, self.resources.ranks, environment))
        hosts = preflight.hosts(self.resources)
        if self.profile.preflight:
            report = preflight.run(self.run, self.stage, self.profile, self.resources, hosts, environment, log)
            # the checks were cut off: no node is to blame
            if (report.bad or report.verdict) and not self.goes_on():
                return self.interrupted()
            for node, reason in report.bad.items():
                say(f"bad node {node}: {reason}")
                self.run.record("bad node", stage=name, node=node, reason=reason, job=self.job)
            if report.verdict:
                return report.verdict
            hosts = report.good
        hosts = hosts[: self.resources.nodes]
        environment = {"MASTER_ADDR": preflight.address(hosts[0]), **environment}
        environment["MASTER_PORT"] = str(job_port(self.job, os.environ.get("SLURMD_NODENAME") == hosts[0]))
        return self.judge(SlurmRanks(log, command, hosts, self.resources.ranks_per_node, environment, self.profile))

    def caches(self) -> dict[str, str]:
        """Where compiled kernels are kept: in the run folder, for the next attempt and the next
        stage, on all nodes alike (torch and Triton write aside and rename); where the job's
        surroundings or the profile's ``environment`` say, if they do."""
        folders = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton"}
        return {
            name: str(self.run.folder.absolute() / "compiled" / folder)
            for name, folder in folders.items()
            if name not in os.environ
        }

    def goes_on(self) -> bool:
        """Whether this job still runs, and nobody has told it to end; Slurm may end a step a moment
        before it tells us."""
        try:
            self.attempt.terminated |= deadline.ask(self.job).state != "RUNNING"
        except commands.SlurmError:
            time.sleep(1)
        return not (self.attempt.asked or self.attempt.terminated)

    def interrupted(self) -> Verdict:
        """Told to end before there was a rank."""
        self.attempt.settle_fate([])
        kind = self.attempt.fate.kind if self.attempt.fate else self.attempt.asked or Class.CANCELLED
        return Verdict(
            kind, f"{REASONS[kind]} before its ranks started; last checkpoint: {shown(self.before)}", code=ENDED
        )

    def judge(self, ranks: LocalRanks | SlurmRanks) -> Verdict:
        """Wait for the ranks; what became of them."""
        attempt, name = self.attempt, self.stage.name
        ended = attempt.wait(ranks)
        if not ended:
            try:
                made = manifest.make(self.run, self.stage, self.number, self.began, ranks.log.left / manifest.VERSIONS)
            except Refused as refused:
                damaged = isinstance(refused, manifest.DamagedOutput)
                return Verdict(Class.REFUSED if damaged else Class.BUG, str(refused))
            manifest.write(self.run, self.stage, made)
            return Verdict(Class.DONE, "", code=0)
        attempt.settle_fate(ended)  # a TERM may have ended the ranks before its reason was known
        fate = attempt.fate.kind if attempt.fate else None
        after = self.run.iteration(name) if self.stage.checkpoints else None
        facts = Facts(name, ended, attempt.printed(), attempt.asked, fate, attempt.hung_minutes, self.before, after)
        return self.with_relief(classify(facts))

    def with_relief(self, verdict: Verdict) -> Verdict:
        """Out of GPU memory: with the settings that would free some, and how much."""
        if verdict.kind is not Class.CUDA_OOM or not self.stage.trainer:
            return verdict
        try:
            config = load(SECTIONS[self.stage.name], self.run.stage(self.stage.name) / "config.json")
            ways = memory.relief(self.stage.name, Shape.read(config.paths.model), config, self.resources, self.profile)
        except (ConfigError, OSError) as error:
            say(f"no estimate of the memory: {error}")
            return verdict
        return replace(verdict, relief=ways)

    def drop_damaged(self) -> None:
        """Go on from the newest checkpoint that is whole; newer ones that are not are moved
        aside."""
        good, bad = checkpoints.newest_intact(self.run, self.stage.name) if self.stage.trainer else (None, {})
        if bad:
            requeue.set_aside(self.run, self.stage, good, bad)
            for iteration, reason in bad.items():
                say(f"checkpoint {iteration} is damaged and moved aside: {reason}")

    def follow(self, verdict: Verdict) -> tuple[str, int]:
        """Done, once more, or failed: (state, exit code); written to status and ledger, and
        done."""
        by_slurm = self.attempt.fate is not None and self.attempt.fate.requeued
        cancelled = self.job is not None and self.run.cancelled_since(self.began, self.job)
        history = requeue.history_of(self.run.ledger(), self.stage.name)
        state, verdict = requeue.decide(
            verdict,
            history,
            self.stage,
            self.profile.max_attempts,
            moved=self.moved(),
            before=self.before,
            requeued=by_slurm,
            cancelled=cancelled,
        )
        code = self.end(state, verdict)  # written first: Slurm ends this job at once
        if state == "requeued" and self.job and not by_slurm:
            try:
                needed = self.resources.nodes + self.resources.spares
                requeue.back_to_queue(self.job, preflight.excluded(self.run, self.job), needed, say)
            except commands.SlurmError as error:
                cause = f"{verdict.cause}; Slurm did not queue it again: {error}"
                return "failed", self.end("failed", replace(verdict, cause=cause, code=1))
        return state, code

    def moved(self) -> bool:
        """Whether this attempt got anything done."""
        return requeue.work_done(self.run, self.stage) > self.done_before

    def end(self, state: str, verdict: Verdict) -> int:
        """Write how the attempt ended; the exit code."""
        name = self.stage.name
        shared = {
            "cause": verdict.cause,
            "iteration": self.run.iteration(name),
            "attempt": self.number,
            "job": self.job,
            "class": verdict.kind.value,
        }
        advice = "" if state in ("done", "requeued") else verdict.advice(name)
        status = {
            "state": state,
            "ended": time.time(),
            "advice": advice,
            "rank": verdict.rank,
            "lines": list(verdict.lines),
            **shared,
        }
        moved = self.moved()
        self.written(lambda: self.run.write_status(name, **status))
        self.written(lambda: self.run.record(state, stage=name, began=self.before, moved=moved, **shared))
        with contextlib.suppress(OSError):
            self.reserves[0].unlink()
        say(f"{name} {state}{f': {verdict.cause}' if verdict.cause else ''}")
        return verdict.code

    def written(self, write: Callable[[], None]) -> None:
        """Write last words, at the price of the reserves where the disk is full."""
        for path in (*self.reserves, None):
            try:
                return write()
            except OSError as error:
                say(f"{error}{f'; {path} is given up' if path else ''}")
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
            say(f"could not mark job {self.job} as this run's ({error}); status will not find it in the queue")

    def on_signal(self, number: int, _frame) -> None:
        """USR1 (time limit ahead), TERM and Ctrl-C."""
        say(f"{signal.Signals(number).name} received")
        self.attempt.signalled(signal.SIGTERM if number == signal.SIGINT else number)


def say(text: str) -> None:
    now = time.time()
    stamp = f"{time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(now))}.{int(now * 1000) % 1000:03d}"
    # the log's disk is full; a signal came in the middle of a line
    with contextlib.suppress(OSError, RuntimeError):
        print(f"{stamp} {text}", flush=True)


@contextlib.contextmanager
def lock_when_free(path: Path, seconds: float):
    """``lock(path)``, waiting for its holder for so long: an orphan of a lost slurmd or controller
    may be about to finish."""
    deadline_s, told = time.monotonic() + seconds, False
    with contextlib.ExitStack() as stack:
        while True:
            try:
                stack.enter_context(lock(path))
                break
            except Busy:
                if time.monotonic() > deadline_s:
                    raise
            if not told:
                say(f"another process holds {path}: it is waited for, at most {seconds:.0f} s")
                told = True
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
