"""Preflight in the allocation: which of its nodes are fit for the ranks. Seconds; a bad node is
named, left out, or excluded.

``launcher.job.node_check`` runs on each node (shared folder, clock, disk, network, driver), then,
where ranks use GPUs, ``training.distributed.gpu_check`` on each GPU (memory, matrix product,
all-reduce within the node and over all).
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import time
from dataclasses import dataclass, field

from launcher import run_module
from launcher.config.profile import Profile
from launcher.config.sections import Resources
from launcher.config.stages import Stage
from launcher.job.outcome import Outcome, OutcomeKind
from launcher.job.rank_log import Log
from launcher.job.ranks import ends
from launcher.job.ranks import step as srun
from launcher.run.folder import Run, write_text
from launcher.slurm import commands, container

OVERLAP_SINCE = (20, 11)
"""Version of Slurm since which a step has CPUs and GPUs to itself, unless it says --overlap."""
SKEW_S = 5
"""Seconds that a node's clock may differ."""


@dataclass
class Report:
    good: list[str]
    """Nodes to use, in the order of the allocation."""
    bad: dict[str, str] = field(default_factory=dict)
    """Node -> what is wrong with it."""
    outcome: Outcome | None = None
    """Why no rank can start, when none can."""


def hosts(resources: Resources) -> list[str]:
    """Nodes of this allocation; SlurmError where there are fewer than the run's resources ask
    for."""
    hosts = commands.call("scontrol", "show", "hostnames", os.environ["SLURM_JOB_NODELIST"]).split()
    if len(hosts) < resources.nodes:
        raise commands.SlurmError(
            f"this allocation has {len(hosts)} node(s), the run's resources ask for {resources.nodes}: "
            f"sbatch --nodes={resources.nodes} --gpus-per-node={resources.ranks_per_node} ..."
        )
    return hosts


def address(host: str) -> str:
    """What other nodes reach ``host`` by: its name, or where that doesn't resolve the address that
    Slurm itself uses."""
    try:
        socket.getaddrinfo(host, None)
        return host
    except OSError:
        fields = commands.call("scontrol", "show", "node", "-o", host).split()
        return next((word.partition("=")[2] for word in fields if word.startswith("NodeAddr=")), host)


class CheckFailed(RuntimeError):
    """A check could not run at all: that says nothing about the nodes."""


def run(
    run: Run,
    stage: Stage,
    profile: Profile,
    resources: Resources,
    nodes: list[str],
    variables: dict[str, str],
    log: Log,
) -> Report:
    """Check all ``nodes``. The report has a verdict with fewer good ones than the stage needs, and
    where the check itself failed."""
    try:
        return _run(run, stage, profile, resources, nodes, variables, log)
    except CheckFailed as error:
        return Report(nodes, outcome=Outcome(OutcomeKind.CHECK, str(error)))


def _run(
    run: Run,
    stage: Stage,
    profile: Profile,
    resources: Resources,
    nodes: list[str],
    variables: dict[str, str],
    log: Log,
) -> Report:
    began = time.monotonic()
    if reason := missing_disk_space(run, stage):
        return Report([], outcome=Outcome(OutcomeKind.DISK_FULL, reason))
    gpus = resources.gpus_per_node if uses_gpus(profile, variables) else 0
    bad = check_nodes(run, stage, profile, gpus, nodes, log)
    good = [node for node in nodes if node not in bad]
    if gpus and len(good) >= resources.nodes:
        hosts, trouble = check_gpus(profile, good, gpus, variables, log)
        bad.update(hosts)
        good = [node for node in nodes if node not in bad]
        if trouble and not hosts:
            return Report(good, bad, Outcome(OutcomeKind.COMMUNICATION, trouble))
    log.write("launcher", f"preflight: {len(good)} of {len(nodes)} node(s) good, {time.monotonic() - began:.1f} s")
    if len(good) >= resources.nodes:
        return Report(good, bad)
    named = "; ".join(f"node {node}: {reason}" for node, reason in bad.items())
    cause = f"{named}; {len(good)} good node(s), {resources.nodes} needed"
    return Report(good, bad, Outcome(OutcomeKind.PREFLIGHT, cause))


def uses_gpus(profile: Profile, variables: dict[str, str]) -> bool:
    return profile.device != "cpu" and variables.get("CUDA_VISIBLE_DEVICES") != ""


def missing_disk_space(run: Run, stage: Stage) -> str:
    """ "" when the run folder's file system has room for one more checkpoint like the last; else
    what is missing."""
    sizes = []
    for name in (stage.name, *stage.parents):
        last = sorted((run.stage(name) / "checkpoints").glob("iter_*"))[-1:]
        sizes += [sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) for folder in last]
        if sizes and name == stage.name:
            break
    needed, free = max(sizes, default=0) if stage.checkpoints else 0, shutil.disk_usage(run.folder).free
    return (
        ""
        if free > needed
        else (
            f"no room for a checkpoint: {free / 1e9:.1f} GB free where {run.folder} is, the last one took "
            f"{needed / 1e9:.1f} GB"
        )
    )


def check_nodes(run: Run, stage: Stage, profile: Profile, gpus: int, nodes: list[str], log: Log) -> dict[str, str]:
    """Run launcher.job.node_check on every node -> the bad ones and why."""
    folder = run.stage(stage.name) / "preflight"
    shutil.rmtree(folder, ignore_errors=True)
    token = f"{run.id} {stage.name} {log.path.stem} {time.time_ns()}"
    write_text(folder / "canary", token)
    variables = {
        "CONVOY_CANARY": token,
        "CONVOY_ADDRESS": address(nodes[0]),
        "CONVOY_NODE_CHECK": profile.node_check,
        "CONVOY_CHECK_S": str(profile.preflight_s),
    }
    command = run_module.command("launcher.job.node_check", str(folder), str(len(nodes)), str(gpus))
    sent = time.time()
    answers = step(command, nodes, 1, variables, profile.preflight_s, log, profile)
    rows = {row["node"]: row for row in answers.rows}
    if nodes[0] not in rows and answers.crashed(0):  # where this process itself runs
        raise CheckFailed(
            f"the check of the nodes itself failed on {nodes[0]}, where the supervisor runs: {answers.crashed(0)}"
        )
    bad = {}
    for rank, node in enumerate(nodes):
        if node not in rows:
            crash = answers.crashed(rank)
            bad[node] = (
                f"could not run the check: {crash}" if crash else f"did not answer within {profile.preflight_s} s"
            )
            continue
        reasons, skew = rows[node]["bad"], rows[node]["time"] - time.time()
        if not sent - SKEW_S <= rows[node]["time"] <= time.time() + SKEW_S:
            reasons.append(f"its clock is {skew:+.0f} s off")
        if not reasons and not _sees(folder / f"{node}.seen", token):
            reasons.append(f"what it wrote into {folder} is not seen here: the file system is not shared")
        if reasons:
            bad[node] = "; ".join(reasons)
    shutil.rmtree(folder, ignore_errors=True)
    return attribute_network_failures(nodes, bad)


def attribute_network_failures(nodes: list[str], bad: dict[str, str]) -> dict[str, str]:
    """Whom the others can't reach is at fault, not they: all report the first node when its network
    is down."""
    first, others = nodes[0], nodes[1:]
    unreached = [node for node in others if bad.get(node, "").startswith("network:")]
    if others and len(unreached) == len(others) and (len(others) > 1 or first in bad):
        bad = {node: reason for node, reason in bad.items() if node not in unreached}
        bad.setdefault(first, "network: no other node can reach it")
    return bad


def _sees(path, text: str) -> bool:
    deadline = time.monotonic() + SKEW_S
    while True:
        if path.exists() and path.read_text() == text:
            return True
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)


@dataclass
class Answers:
    """What became of one srun."""

    rows: list[dict]
    """The JSON lines that came in time."""
    lines: list[str]
    """Everything else that was printed."""
    in_time: bool

    def crashed(self, task: int) -> str:
        """The last words of a task that ended without an answer; "" where srun still waited for
        it."""
        if not self.in_time and task not in [rank for line in self.lines for rank, code in ends(line) if code > 0]:
            return ""  # the others were killed when the time was up
        lines = [line for line in self.lines if not line.startswith("srun: ")] or self.lines
        return lines[-1].strip() if lines else "no message"


def step(
    command: list[str],
    nodes: list[str],
    tasks: int,
    variables: dict[str, str],
    seconds: float,
    log: Log,
    profile: Profile,
    options: tuple[str, ...] = (),
) -> Answers:
    """Run ``command`` by srun, ``tasks`` on each node. What is no JSON line goes into the log, too.

    The step shares CPUs and GPUs: the ranks can start while one of its tasks hangs on a node.
    """
    shared = () if (0, 0) < profile.version < OVERLAP_SINCE else ("--overlap",)
    process = subprocess.Popen(
        [*srun(nodes, tasks, "--kill-on-bad-exit=0", *shared, *options), *command],
        env={**container.for_step(profile), **variables},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    in_time = True
    try:
        text, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        in_time = False
        process.terminate()  # srun ends its tasks; a node that is gone may keep it waiting
        try:
            text, _ = process.communicate(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            text, _ = process.communicate()
    rows, rest = [], []
    for line in text.splitlines():
        try:
            row = json.loads(line) if line.startswith("{") else None
        except json.JSONDecodeError:
            row = None
        if row is None:
            log.write("preflight", line)
        (rest if row is None else rows).append(line if row is None else row)
    return Answers(rows, [line for line in rest if line.strip()], in_time)


def check_gpus(
    profile: Profile, nodes: list[str], gpus: int, variables: dict[str, str], log: Log
) -> tuple[dict[str, str], str]:
    """Run training.distributed.gpu_check on every GPU -> (bad nodes and why, what is wrong between
    nodes that are good by themselves)."""
    command = container.inside(profile, run_module.command("training.distributed.gpu_check", options=("-u",)))
    seconds, options = 2 * profile.preflight_s, tuple(container.srun_options(profile, variables))
    wrapped = [
        "bash",
        "-c",
        "export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID "
        'LOCAL_WORLD_SIZE=$SLURM_NTASKS_PER_NODE NODE=$SLURMD_NODENAME; exec "$@"',
        "rank",
        *command,
    ]

    def ask(some: list[str]) -> list[dict]:
        # not the one that the ranks will use
        port = 20000 + (int(os.environ["SLURM_JOB_ID"]) + 6000) % 12000
        shared = container.passed_on(profile, {"MASTER_ADDR": address(some[0]), "MASTER_PORT": str(port), **variables})
        answers = step(wrapped, some, gpus, shared, seconds, log, profile, options)
        if not answers.rows and answers.in_time:
            raise CheckFailed(f"the check of the GPUs itself failed on {', '.join(some)}: {answers.crashed(0)}")
        return answers.rows

    bad, trouble = judge_gpus(ask(nodes), nodes, gpus, seconds)
    if not bad and trouble and len(nodes) > 2:
        bad = find_bad_node_by_pairs(nodes, lambda some: not any(judge_gpus(ask(some), some, gpus, seconds)), trouble)
    return bad, trouble


def judge_gpus(rows: list[dict], nodes: list[str], gpus: int, seconds: int) -> tuple[dict[str, str], str]:
    """Rows of training.distributed.gpu_check -> (bad nodes and why, trouble that shows only between
    nodes)."""
    bad: dict[str, str] = {}
    for row in rows:
        if row["check"] != "all" and row["bad"] and row["node"] not in bad:
            bad[row["node"]] = f"GPU {row['gpu']}: {row['bad']}"
    for node in nodes:
        passed = {row["gpu"] for row in rows if row["node"] == node and row["check"] == "node" and not row["bad"]}
        if node not in bad and len(passed) < gpus:
            missing = sorted(set(range(gpus)) - passed)
            bad[node] = f"GPU {missing[0]}: no answer from its check within {seconds} s"
    speeds = sorted(row["tflops"] for row in rows if row["check"] == "gpu" and not row["bad"])
    for row in rows:
        if row["check"] == "gpu" and not row["bad"] and row["tflops"] < speeds[len(speeds) // 2] / 2:
            bad.setdefault(
                row["node"], f"GPU {row['gpu']}: {row['tflops']:.0f} TFLOP/s, the others {speeds[len(speeds) // 2]:.0f}"
            )
    passed = sum(row["check"] == "all" and not row["bad"] for row in rows)
    reason = next((row["bad"] for row in rows if row["check"] == "all" and row["bad"]), "no answer")
    return bad, "" if passed == len(nodes) * gpus else f"the all-reduce over {len(nodes)} node(s) failed: {reason}"


def find_bad_node_by_pairs(nodes: list[str], fine, trouble: str) -> dict[str, str]:
    """The node that an all-reduce fails with, found by asking pairs; ``fine(nodes)`` runs the
    checks on some of them."""
    pairs = list(zip(nodes[::2], nodes[1::2], strict=False))
    good = [pair for pair in pairs if fine(list(pair))]
    suspects = [node for node in nodes if not any(node in pair for pair in good)]
    if not good:
        return {}  # not one pair works: the network or its settings, not a node
    return {node: trouble for node in suspects if not fine([good[0][0], node])}


def bad_nodes(run: Run, job: int) -> list[str]:
    """Nodes that were found bad in this job, for ``scontrol update excnodelist``."""
    return sorted({event["node"] for event in run.ledger() if event["event"] == "bad node" and event.get("job") == job})
