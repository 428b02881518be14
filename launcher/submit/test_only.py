"""What ``sbatch --test-only`` says of a plan: when Slurm could start each stage, or that it would
refuse the stage. Nothing is queued."""

from __future__ import annotations

import re
import tempfile
from dataclasses import dataclass

from launcher.config import environment
from launcher.slurm import commands
from launcher.submit import create
from training.errors import ConfigError

REFUSAL = "allocation failure"
"""``sbatch --test-only`` prints this where Slurm would never run the request."""
NO_FITTING_NODE = "node configuration is not available"
"""``sbatch --test-only`` prints this where no node fits the request, and also where the nodes that
fit are down or drained. Slurm queues the second kind."""


@dataclass(frozen=True)
class ExpectedStart:
    """When Slurm could start one stage."""

    time: str
    """As Slurm prints it, e.g. "2026-11-23T23:43:25"; "" where Slurm gave no time."""
    nodes: str
    unknown_reason: str = ""
    """Why Slurm gave no time."""


def expected_starts(plan: create.Plan) -> dict[str, ExpectedStart]:
    """Stage -> when Slurm could start it if it were queued now.

    {} under a local profile. Where no controller answers, each stage has the reason. Raises a
    ConfigError that names every stage which Slurm would refuse.
    """
    if plan.profile.scheduler != "slurm":
        return {}
    if reason := commands.unusable():  # else sbatch would try for 10 s, and call it a refusal
        return _unknown(plan, reason)
    starts, refusals = {}, []
    for stage, text in create.render_all(plan).items():
        try:
            starts[stage] = parse_start(_test_only(plan, text))
        except commands.SlurmError as error:
            if REFUSAL not in str(error):
                return _unknown(plan, str(error))
            if NO_FITTING_NODE in str(error) and (unavailable := _unavailable_nodes(plan, stage)):
                starts[stage] = ExpectedStart("", "", f"{unavailable}; with all of them it may fit")
                continue
            refusals.append(
                f"{stage}: Slurm would refuse it: {_refusal(str(error))} (it requests {_request(plan, stage)}); change "
                f"resources.{stage}, or partition, account and limits of profile {plan.profile.name}"
            )
    if refusals:
        raise ConfigError(*refusals)
    return starts


def parse_start(text: str) -> ExpectedStart:
    """From sbatch's line "sbatch: Job 11 to start at TIME using 2 processors on nodes NODES in
    partition main"."""
    match = re.search(r"to start at (\S+)(?: .*?on nodes (\S+))?", text)
    if not match:
        return ExpectedStart("", "", text.strip() or "sbatch --test-only printed nothing")
    return ExpectedStart(match[1], match[2] or "")


def _test_only(plan: create.Plan, script: str) -> str:
    """What sbatch prints for one script. Raises SlurmError."""
    with tempfile.NamedTemporaryFile("w", suffix=".sbatch", encoding="utf-8") as file:
        file.write(script)
        file.flush()
        environ = environment.for_sbatch(plan.profile.passed)
        return commands.call("sbatch", "--test-only", file.name, environ=environ, with_errors=True)


def _unknown(plan: create.Plan, reason: str) -> dict[str, ExpectedStart]:
    return {stage.name: ExpectedStart("", "", reason) for stage in plan.stages}


def _request(plan: create.Plan, stage: str) -> str:
    """E.g. "2 nodes x 8 GPUs for 60 min in partition main"."""
    resources = plan.resources(plan.graph[stage])
    partition = resources.at(plan.profile).partition
    where = f"partition {partition}" if partition else "the default partition"
    nodes = f"{resources.nodes + resources.spares} nodes x {resources.gpus_per_node} GPUs"
    return f"{nodes} for {resources.minutes} min in {where}"


def _unavailable_nodes(plan: create.Plan, stage: str) -> str:
    """E.g. "3 of 4 nodes are down, drained or reserved", of the stage's partition; "" where all are
    available."""
    partition = plan.resources(plan.graph[stage]).at(plan.profile).partition
    options = [f"--partition={partition}"] if partition else []
    states = [
        line.rstrip("*~#!%$@^-").lower()
        for line in commands.call("sinfo", "-h", "-N", *options, "-o", "%T").splitlines()
    ]
    unavailable = sum(not state.startswith(("idle", "mixed", "alloc", "comp")) for state in states)
    return f"{unavailable} of {len(states)} nodes are down, drained or reserved" if unavailable else ""


def _refusal(text: str) -> str:
    """The refusal itself, without what Slurm prints around it."""
    return next((line.partition(f"{REFUSAL}: ")[2] for line in text.splitlines() if REFUSAL in line), text)
