"""Signals, preemption, time limits, and what a person does with scancel and scontrol."""

from __future__ import annotations

import time

from tests.slurm.faults.case import Case, scenario

LONG = {"sft.iterations": 20}
STEP = {"step_s": 0.2}


def _preempted(case: Case, partition: str) -> str:
    case.project.behave(sft=STEP)
    case.submit("--until", "reward", sets=LONG, profile=case.profile(partition=f'"{partition}"'))
    case.begun("sft", 2)
    case.cluster.call("sbatch", "--partition=urgent", "--exclusive", "--output=/dev/null", "--wrap=sleep 1")
    case.inject()
    case.notice(lambda: case.state("sft") in ("requeued", "cancelled", "failed"), 20, "the attempt's end")
    status = case.status("sft")
    case.done("sft", "reward", seconds=90)
    assert status["state"] == "requeued" and status.get("class") == "preempted", f"the user was told {status}"
    starts = [
        (row["attempt"], row["iteration"] is None) for row in case.project.ledger("started") if row["stage"] == "sft"
    ]
    assert starts == [(1, True), (2, False)], f"sft did not go on from what it had saved: {starts}"
    return "saved, queued again by its job, went on: done"


@scenario("preempted: TERM, no GraceTime", cluster={"NODES": 1}, seconds=25)
def preempted(case: Case) -> str:
    return _preempted(case, "low")


@scenario("preempted: TERM, GraceTime 10 s", cluster={"NODES": 1}, seconds=25)
def preempted_with_grace(case: Case) -> str:
    return _preempted(case, "grace")


@scenario("preempted: PreemptMode=CANCEL", cluster={"NODES": 1}, seconds=25)
def preempted_for_good(case: Case) -> str:
    return _preempted(case, "killed")


@scenario("USR1 ahead of the time limit", seconds=20)
def usr1_lead(case: Case) -> str:
    case.project.behave(sft=STEP)
    case.submit("--until", "reward", sets=LONG)
    case.begun("sft", 2)
    case.cluster.call("scancel", "--batch", "--signal=USR1", case.job("sft"))
    case.inject()
    case.notice(lambda: case.state("sft") == "requeued", 20, "save and requeue")
    case.done("sft", "reward")
    return "saved, queued again, went on: done"


@scenario("requeue of the job disabled, then its time limit", seconds=20)
def requeue_disabled(case: Case) -> str:
    case.project.behave(sft=STEP)
    case.submit("--until", "reward", sets=LONG)
    case.begun("sft", 2)
    case.cluster.call("scontrol", "update", f"jobid={case.job('sft')}", "requeue=0")
    case.cluster.call("scancel", "--batch", "--signal=USR1", case.job("sft"))
    case.inject()
    cause = case.fails("sft", "reached its time limit; saved iteration", "Slurm did not queue it again", "--no-requeue")
    assert case.status("sft")["class"] == "time limit", case.status("sft")
    case.resume()
    case.done("sft", "reward")
    return f"{cause}; resumed: done"


@scenario("true time limit of 1 min", slow=True, seconds=130)
def time_limit(case: Case) -> str:
    case.project.behave(sft={"step_s": 1})
    case.submit("--until", "reward", sets={"sft.iterations": 70, "resources.sft.minutes": 1})
    case.begun("sft", 2)
    case.inject()
    case.notice(lambda: case.state("sft") == "requeued", 90, "save and requeue")
    case.done("sft", "reward", seconds=180)
    return "saved before the limit, queued again, went on: done"


@scenario("true time limit of 1 min of the evaluation", slow=True, seconds=180)
def time_limit_of_evaluation(case: Case) -> str:
    """It has no checkpoints: what it has made counts as progress."""
    case.project.behave(mtbench={"step_s": 1, "items": 80})
    case.submit(sets={"resources.mtbench.minutes": 1})
    case.until(lambda: case.state("mtbench") == "running", 60, "mtbench runs")
    case.inject()
    case.notice(lambda: case.state("mtbench") == "requeued", 90, "save and requeue")
    case.done("sft", "reward", "rlhf", "export", "mtbench", seconds=240)
    causes = [event["cause"] for event in case.project.ledger("requeued")]
    assert len(causes) > 1 and set(causes) == {"reached its time limit; what is done is kept"}, causes
    return "ended before the limit, queued again as often as it takes, went on: done"


@scenario("true time limit of 1 min, ranks don't heed the signal", slow=True, seconds=180)
def time_limit_deaf(case: Case) -> str:
    case.project.behave(sft={"step_s": 1, "deaf": True, "save_every": 500})
    case.submit("--until", "reward", sets={"sft.iterations": 200, "resources.sft.minutes": 1})
    case.until(lambda: case.state("sft") == "running", 30, "sft runs")
    case.inject()
    case.notice(lambda: case.state("sft") == "requeued", 120, "ended before Slurm does it")
    cause = case.fails("sft", "no progress", "time limit", seconds=200)
    assert not case.executed().get(("demo", "sft")), "nothing was saved"
    return cause


@scenario("scancel of the running parent")
def scancel_parent(case: Case) -> str:
    case.project.behave(sft=STEP)
    case.submit("--until", "reward", sets=LONG)
    case.begun("sft", 2)
    case.cluster.call("scancel", case.job("sft"))
    case.inject()
    said = case.fails("sft", states=("cancelled",))
    row = case.row("reward")
    assert row["state"] == "cancelled", row
    assert not case.has("reward/rank_0.json"), "the child of a cancelled stage ran"
    case.resume()
    case.done("sft", "reward")
    return f"{said}; resumed: done"


@scenario("scancel of the waiting child")
def scancel_child(case: Case) -> str:
    case.project.behave(sft=STEP)
    case.submit("--until", "rlhf", sets={"sft.iterations": 8})
    case.begun("sft")
    case.cluster.call("scancel", case.job("reward"))
    case.inject()
    case.notice(lambda: case.row("reward")["state"] == "cancelled", 10, "status says cancelled")
    case.until(lambda: case.has("sft/DONE.json") and case.idle(), 30, "sft goes on to its end")
    assert case.row("rlhf")["state"] == "cancelled", "rlhf can't run without reward"
    case.resume()
    case.done("convert", "sft", "reward", "rlhf")
    return "the parent goes on, its other children are cancelled; resumed: done"


@scenario("failed parent requeued by hand, succeeds late", seconds=20)
def parent_requeued(case: Case) -> str:
    case.project.behave(sft={"exit_at": 2, "code": 1})
    case.submit("--until", "reward")
    case.inject()
    case.notice(lambda: case.state("sft") == "failed", 30, "failure")
    case.until(case.idle, 20, "child cancelled")
    case.cluster.call("scontrol", "requeue", case.job("sft"))
    case.until(lambda: case.has("sft/DONE.json"), 40, "sft done late")
    time.sleep(1.5)  # a child that Slurm would wrongly start begins within its 1 s tick
    assert not case.has("reward/rank_0.json") and case.row("reward")["state"] == "cancelled"
    case.resume()
    case.done("convert", "sft", "reward")
    return "sft done late, its child stays cancelled; resumed: done"
