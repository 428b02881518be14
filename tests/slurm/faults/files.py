"""What happens to the run folder: its disk, its checkpoints, its manifests."""

from __future__ import annotations

import contextlib
import os
import subprocess

from tests.slurm.faults.case import Case, scenario

SIZE = "256m"
"""Of a file system of a scenario's own: what submit wants to see free for a tiny run, and some."""
WEIGHTS = "sft/checkpoints/iter_0000003/model/weights"


@scenario("disk full while saving", seconds=20)
def disk_full(case: Case) -> str:
    case.mount(case.run.parent, SIZE)
    case.project.behave(sft={"step_s": 0.3})
    case.submit("--until", "reward", sets={"sft.iterations": 40})
    case.begun("sft", 2)
    filler = case.run.parent / "filler"
    case.inject()
    with open(filler, "wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(1 << 20)):
            pass
    case.notice(lambda: case.row("sft")["state"] == "failed", 30, "status says failed")
    why = case.row("sft")["why"]
    case.until(case.idle, 20, "child cancelled")
    assert not case.has("reward/rank_0.json"), "the child of a failed stage ran"
    assert "No space left on device" in why, f"the cause: {why}"
    filler.unlink()
    case.resume()
    case.done("sft", "reward")
    return f"failed: {why}; space made, resumed: done"


@scenario("file too large for the user's limit (RLIMIT_FSIZE) while saving")
def file_limit(case: Case) -> str:
    case.project.behave(sft={"big_at": 3})
    case.submit("--until", "reward")
    case.inject()
    cause = case.fails("sft", "rank 0", "File too large")
    assert (case.run / "sft/latest").read_text() == "2\n", "half a checkpoint counts"
    (case.folder / "mended").touch()
    case.resume()
    case.done("sft", "reward")
    return f"{cause}; resumed: done"


@scenario("parent's checkpoint truncated")
def checkpoint_truncated(case: Case) -> str:
    return _harmed(case, b"sft", "truncated or overwritten")


@scenario("one bit flipped in the parent's checkpoint")
def checkpoint_bit_flipped(case: Case) -> str:
    return _harmed(case, b"sft 2", "sha256")  # "3" and "2" differ in one bit


def _harmed(case: Case, content: bytes, reason: str) -> str:
    case.submit("--until", "sft")
    case.done("sft")
    (case.run / WEIGHTS).write_bytes(content)
    case.inject()
    submitted = case.project.submit("--until", "reward", profile="dev")
    if submitted.returncode:  # seen before anything was queued: better still
        assert reason in submitted.stderr, submitted.stderr
        case.notice(lambda: True, 0, "")
        cause = "submit refuses"
    else:
        cause = case.fails("reward", reason)
    assert not case.has("reward/rank_0.json"), "reward's ranks started on a harmed checkpoint"
    case.resume("--from", "sft", "--load-iteration", "2", "--until", "reward")
    case.until(lambda: case.has("reward/DONE.json"), 60, "reward done")
    executed = case.executed()["demo", "sft"]
    assert executed == {1: 1, 2: 1, 3: 2}, f"only the harmed iteration runs again: {executed}"
    return f"{cause}; resumed from the one before: done"


@scenario("newest checkpoint of a failed stage truncated, then resume")
def own_checkpoint_truncated(case: Case) -> str:
    case.project.behave(sft={"step_s": 0.1, "exit_at": 6, "code": 1})
    case.submit("--until", "reward", sets={"sft.iterations": 8})
    case.begun("sft", 5)
    case.fails("sft")
    (case.run / "sft/checkpoints/iter_0000005/model/weights").write_text("sft")
    case.inject()
    case.resume()
    case.notice(
        lambda: case.project.ledger("bad checkpoint"), 20, "the damaged checkpoint is seen before a rank starts"
    )
    case.until(lambda: case.has("reward/DONE.json"), 40, "chain done")
    executed = case.executed()["demo", "sft"]
    assert executed == {**dict.fromkeys(range(1, 9), 1), 5: 2}, f"only the damaged iteration runs again: {executed}"
    assert case.project.ledger("bad checkpoint")[0]["iteration"] == 5
    return "moved aside, went on from the one before: done"


@scenario("DONE.json removed")
def done_removed(case: Case) -> str:
    case.submit("--until", "reward")
    case.done("convert", "sft", "reward")
    (case.run / "sft/DONE.json").unlink()
    case.inject()
    case.notice(lambda: case.row("sft")["state"] != "done", 5, "status does not call it done")
    refused = case.project.submit(target="rlhf", profile="dev")
    assert refused.returncode == 2 and "sft" in refused.stderr, refused.stdout + refused.stderr
    case.resume("--until", "rlhf")
    case.done("convert", "sft", "reward", "rlhf")
    return "submit of a child refuses; resumed: marked done again, nothing trained twice"


@scenario("run folder read-only at submit")
def read_only_at_submit(case: Case) -> str:
    _mount(case)
    _read_only(case)
    case.inject()
    refused = case.project.submit(profile="dev")
    assert refused.returncode and REFUSAL in refused.stderr and "Traceback" not in refused.stderr, refused.stderr
    case.notice(lambda: True, 0, "")
    assert str(case.folder) not in case.cluster.call("squeue", "-h", "-t", "all", "-o", "%Z"), "something was queued"
    _writable(case)
    case.submit("--until", "sft")
    case.done("convert", "sft")
    return "submit says so, nothing is queued; writable again, submitted: done"


@scenario("run folder turns read-only while a stage runs", seconds=20)
def read_only_in_run(case: Case) -> str:
    _mount(case)
    case.project.behave(sft={"step_s": 0.3})
    case.submit("--until", "reward", sets={"sft.iterations": 40})
    case.begun("sft", 2)
    _read_only(case)
    case.inject()
    case.notice(lambda: case.row("sft")["state"] == "failed", 30, "status says failed")
    why = case.row("sft")["why"]
    case.until(case.idle, 20, "child cancelled")
    assert REFUSAL in why, f"the cause: {why}"
    _writable(case)
    assert not case.has("reward/rank_0.json"), "the child of a failed stage ran"
    case.resume()
    case.done("sft", "reward")
    return f"failed: {why}; writable again, resumed: done"


ROOT = os.geteuid() == 0
REFUSAL = "Read-only file system" if ROOT else "Permission denied"


def _mount(case: Case) -> None:
    case.run.parent.mkdir(exist_ok=True)
    if ROOT:
        case.mount(case.run.parent, SIZE)


def _read_only(case: Case) -> None:
    """Open files can still be written, as when a file server's disk dies. Root heeds no modes: then
    the folder over itself, read-only."""
    path = str(case.run.parent)
    if not ROOT:
        subprocess.run(["chmod", "-R", "a-w", path], check=True)
        return
    subprocess.run(["mount", "--bind", path, path], check=True)
    subprocess.run(["mount", "-o", "remount,bind,ro", path], check=True)


def _writable(case: Case) -> None:
    path = str(case.run.parent)
    subprocess.run(["umount", "-l", path] if ROOT else ["chmod", "-R", "u+w", path], check=True)
