"""What a site and its users do: two at once, ports, names, secrets."""

from __future__ import annotations

import os
import socket
import subprocess

from tests.slurm.faults.case import Case, scenario

SECRET = "sk-chaos-2718281828"


@scenario("two submits of one run at once")
def two_submits(case: Case) -> str:
    arguments = ("submit", "full-pipeline", "--name", "demo", "--profile", "dev", "--until", "reward")
    sets = [
        word
        for stage in ("sft", "reward", "rlhf")
        for key, value in (("iterations", 3), ("warmup_iterations", 0))
        for word in ("--set", f"{stage}.{key}={value}")
    ]
    case.inject()
    both = [case.project.start(*arguments, *sets) for _ in range(2)]
    said = [process.communicate(timeout=60)[0] for process in both]
    assert 0 in [process.returncode for process in both], said
    case.notice(lambda: True, 0, "")
    case.done("convert", "sft", "reward")
    submitted = [row["stage"] for row in case.project.ledger("submitted")]
    assert submitted == ["convert", "sft", "reward"], f"queued twice: {submitted}; {said}"
    return "one queues, the other says that it is: done"


@scenario("two runs on one node at once (ports)", cluster={"NODES": 1}, seconds=15)
def two_runs_on_one_node(case: Case) -> str:
    case.project.behave(sft={"step_s": 0.5})
    case.submit("--until", "sft", sets={"sft.iterations": 16})
    case.inject()
    other = case.project.convoy(
        "submit",
        "full-pipeline",
        "--name",
        "other",
        "--profile",
        "dev",
        "--until",
        "sft",
        "--set",
        "sft.iterations=16",
        "--set",
        "sft.warmup_iterations=0",
    )
    case.check(other)
    places = [case.folder / "runs" / run / "sft" for run in ("demo", "other")]
    try:
        case.until(lambda: all((place / "rank_0.json").exists() for place in places), 30, "both train")
        assert not any((place / "DONE.json").exists() for place in places), "they were to run at the same time"
        ports = {case.project.json(f"../{run}/sft/rank_0.json")["MASTER_PORT"] for run in ("demo", "other")}
        assert len(ports) == 2, f"both on port {ports}"
        case.done("convert", "sft")
        case.until(lambda: all((place / "DONE.json").exists() for place in places), 30, "both done")
        case.once("convert", "sft", run="other")
    finally:
        case.project.convoy("cancel", "other")
    return "each has its own port: both done"


@scenario("the job's port is taken by a stranger", cluster={"NODES": 1}, seconds=15)
def port_taken(case: Case) -> str:
    case.project.behave(convert={"step_s": 1})
    case.submit("--until", "sft")
    case.inject()
    with socket.create_server(("", 20000 + int(case.job("sft")) % 12000)):
        case.until(lambda: case.has("sft/DONE.json") or case.state("sft") == "failed", 40, "end of sft")
        if case.has("sft/DONE.json"):
            case.once("convert", "sft")
            return "another port was chosen: done"
        cause = case.fails("sft", "Address already in use")
    case.resume()
    case.done("convert", "sft")
    return f"{cause}; resumed: done"


@scenario("node's name does not resolve", cluster={"NODES": 1, "NAME": "ghost"}, seconds=15)
def host_unresolvable(case: Case) -> str:
    case.submit("--until", "sft")
    case.inject()
    case.until(
        lambda: case.has("sft/DONE.json") or "failed" in (case.state("convert"), case.state("sft")), 40, "an end"
    )
    if case.has("sft/DONE.json"):
        case.once("convert", "sft")
        return "ranks meet at the node's address: done"
    stage = "convert" if case.state("convert") == "failed" else "sft"
    return case.fails(stage, "ghost1", "resolve")


@scenario("secrets in the environment and in a rank's output")
def secret_in_environment(case: Case) -> str:
    """One in the environment of the command, one in the profile's file; a rank prints it.
    Everything that the run wrote is read."""
    secrets = case.folder.parent / f"{case.folder.name}.secrets"
    secrets.write_text(f"CHAOS_JUDGE_KEY={SECRET}-file\n")
    secrets.chmod(0o600)
    case.project.environment["WANDB_API_KEY"] = f"{SECRET}-environment"
    case.project.behave(sft={"step_s": 0.3, "say": "CHAOS_JUDGE_KEY"})
    profile = case.profile(secrets=f'"{secrets}"')
    planned = case.project.convoy("plan", "full-pipeline", "--profile", profile)
    case.inject()
    case.submit("--until", "sft", profile=profile, sets={"sft.iterations": 6})
    case.begun("sft")
    seen = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    case.done("convert", "sft")
    shown = [
        planned.stdout + planned.stderr,
        seen,
        case.project.convoy("logs", "demo", "sft").stdout,
        case.project.convoy("status", "demo").stdout,
        case.cluster.call("scontrol", "show", "job"),
        case.cluster.call("scontrol", "write", "batch_script", case.job("sft"), "-"),
    ]
    shown += [path.read_text(errors="replace") for path in case.folder.rglob("*") if path.is_file()]
    leaks = [text[max(0, text.index(SECRET) - 80) :][:160] for text in shown if SECRET in text]
    assert not leaks, f"{len(leaks)} leaks: {leaks[:3]}"
    assert "CHAOS_JUDGE_KEY is " in case.project.log("sft") and "CHAOS_JUDGE_KEY is None" not in case.project.log(
        "sft"
    ), "rank has it"
    os.unlink(secrets)
    return "in no script, log, manifest, ps line or plan; the ranks have it"
