"""Endings from what ranks, torch, NCCL, gloo, the kernel and Slurm really print; deadlines and
limits from numbers. Nothing runs here."""

import contextlib
import dataclasses
import json
import re
import socket

import pytest

from launcher.config.sections import SECTIONS, Resources
from launcher.config.stages import ALL
from launcher.job import advice, deadline, node_check, preflight, requeue
from launcher.job.advice import ADVICE
from launcher.job.deadline import JobFacts
from launcher.job.outcome import AttemptFacts, LastWords, Outcome, OutcomeKind, RankExit, classify
from launcher.job.rank_log import Log
from launcher.job.ranks import PORTS, ends, job_port
from launcher.job.slurm_action import SlurmAction, derive_action
from launcher.run import progress
from launcher.run.folder import Run

CUDA = (
    "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 29.76 GiB. GPU 0 has a total capacity of 79.11 GiB "
    "of which 12.73 GiB is free. Including non-PyTorch memory, this process has 66.38 GiB memory in use."
)
WATCHDOG = (
    "[E321 02:07:08.408271257 ProcessGroupNCCL.cpp:607] [Rank 0] Watchdog caught collective operation timeout: "
    "WorkNCCL(SeqNum=1580, OpType=ALLREDUCE, NumelIn=466119168, NumelOut=466119168, Timeout(ms)=600000) ran for 600060 "
    "milliseconds before timing out."
)
ABORT = "what():  [PG ID 0 PG GUID 0(default_pg) Rank 0] Process group watchdog thread terminated with exception"
CLOSED = (
    "RuntimeError: [../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:26441"
)
GLOO = (
    "RuntimeError: [../third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 1800000ms for recv "
    "operation to complete"
)
REMOTE = (
    "torch.distributed.DistBackendError: NCCL error in: ../torch/csrc/distributed/c10d/NCCLUtils.hpp:268, remote "
    "process exited or there was a network error, NCCL version 2.21.5"
)
OOM_STEP = (
    "slurmstepd: error: Detected 1 oom_kill event in StepId=11300781.0. Some of the step tasks have been OOM Killed."
)
ECC = "RuntimeError: CUDA error: uncorrectable ECC error encountered"
FULL = "OSError: [Errno 28] No space left on device: 'runs/hh/sft/checkpoints/.iter_0000100.saving/model/__0_0.distcp'"
STEP = "slurmstepd-n1: error: *** STEP 7.0 ON n1 CANCELLED AT 2026-11-23T23:29:46 DUE TO {} ***"


def rank(code, line, number=0, lines=()):
    return RankExit(code, number, line, (*lines, line))


@pytest.mark.parametrize(
    "exits, srun_lines, kind",
    [
        ([rank(1, CUDA)], [], OutcomeKind.CUDA_OOM),
        (
            [rank(1, "torch.cuda.OutOfMemoryError: CUDA out of memory. Tried to allocate 1.70 GiB.")],
            [],
            OutcomeKind.CUDA_OOM,
        ),
        (
            [rank(1, "RuntimeError: CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")],
            [],
            OutcomeKind.CUDA_OOM,
        ),
        (
            [rank(-9, "iteration 7/10")],
            [OOM_STEP, "srun: error: nid001277: tasks 1-3: Out Of Memory"],
            OutcomeKind.HOST_OOM,
        ),
        ([rank(1, "MemoryError")], [], OutcomeKind.HOST_OOM),
        (
            [
                rank(
                    1,
                    "RuntimeError: [enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory: you "
                    "tried to allocate 8e9 bytes. Error code 12 (Cannot allocate memory)",
                )
            ],
            [],
            OutcomeKind.HOST_OOM,
        ),
        ([rank(1, "FloatingPointError: iteration 7: not finite: {'loss': nan}")], [], OutcomeKind.NAN),
        (
            [
                rank(
                    -6,
                    ABORT,
                    lines=[WATCHDOG, "terminate called after throwing an instance of 'c10::DistBackendError'"],
                )
            ],
            [],
            OutcomeKind.COMMUNICATION,
        ),
        ([rank(1, GLOO)], [], OutcomeKind.COMMUNICATION),
        ([rank(1, REMOTE)], [], OutcomeKind.COMMUNICATION),
        (
            [
                rank(
                    1,
                    "torch.distributed.DistStoreError: Timed out after 601 seconds waiting for clients. 3/4 "
                    "clients joined.",
                )
            ],
            [],
            OutcomeKind.COMMUNICATION,
        ),
        (
            [
                rank(
                    1,
                    "torch.distributed.DistNetworkError: The client socket has failed to connect to any network "
                    "address of (n7, 20017). The IPv4 network addresses of (n7, 20017) cannot be retrieved (gai "
                    "error: -2 - Name or service not known).",
                )
            ],
            [],
            OutcomeKind.COMMUNICATION,
        ),
        ([rank(1, ECC)], [], OutcomeKind.NODE_FAILURE),
        ([rank(1, "RuntimeError: No CUDA GPUs are available")], [], OutcomeKind.NODE_FAILURE),
        (
            [RankExit(143)],
            [
                "srun: error: Node failure on n4",
                "srun: Job step aborted: Waiting up to 5 seconds for job step to finish.",
            ],
            OutcomeKind.NODE_FAILURE,
        ),
        ([rank(1, FULL)], [], OutcomeKind.DISK_FULL),
        (
            [rank(74, "error: saving iteration 4 failed on rank 0: [Errno 122] Disk quota exceeded")],
            [],
            OutcomeKind.DISK_FULL,
        ),
        (
            [
                rank(
                    76,
                    "error: paused by a health gate: KL to the reference, nats per response = 120, kl_max = 100, 20 "
                    "iterations in a row; iteration 30 is saved, and resume goes on from it",
                )
            ],
            [],
            OutcomeKind.UNHEALTHY,
        ),
        ([rank(64, "error: sft.lr = -1: expected above 0")], [], OutcomeKind.BAD_CONFIG),
        ([rank(65, "error: rows.jsonl line 7: field prompt is missing")], [], OutcomeKind.BAD_DATA),
        (
            [rank(73, "error: saving iteration 4 failed on rank 0: [Errno 13] Permission denied: 'sft/checkpoints'")],
            [],
            OutcomeKind.FILE_ERROR,
        ),
        ([rank(4, "sft: no average, because 3 of 160 ratings are valid")], [], OutcomeKind.TOO_FEW_RATINGS),
        ([rank(1, "urllib.error.URLError: <urlopen error [Errno 111] Connection refused>")], [], OutcomeKind.BUG),
        (
            [rank(1, "requests.exceptions.ConnectionError: api.wandb.ai: Name or service not known")],
            [],
            OutcomeKind.BUG,
        ),
        ([rank(-9, "iteration 7/10")], [], OutcomeKind.KILLED),
        ([rank(-11, "Current thread 0x00007f (most recent call first):")], [], OutcomeKind.BUG),
        ([rank(1, "KeyError: 'prompt'", lines=["urllib3: Connection refused, tried again"])], [], OutcomeKind.BUG),
        ([rank(3, "")], [], OutcomeKind.BUG),
    ],
)
def test_class_of_real_last_words(exits, srun_lines, kind):
    outcome = classify(AttemptFacts("sft", exits, srun_lines, before=1, after=4))
    assert outcome.kind is kind
    assert outcome.may_requeue == (kind in (OutcomeKind.COMMUNICATION, OutcomeKind.NODE_FAILURE))
    assert outcome.code not in (0, 75), "a failure never looks like success or a requeue"
    assert "{" not in outcome.advice("sft") and outcome.advice("sft")


def test_the_rank_with_a_cause_of_its_own_comes_before_those_that_noticed():
    """Measured: peers see the closed connection within 20 ms, and srun may report them first."""
    exits = [rank(1, CLOSED, 2), rank(-15, "iteration 3/10", 0), rank(1, CUDA, 5), rank(1, CLOSED, 1)]
    outcome = classify(AttemptFacts("rlhf", exits))
    assert (outcome.kind, outcome.rank) == (OutcomeKind.CUDA_OOM, 5)
    assert outcome.cause.startswith(
        "rank 5: exit code 1: torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 29.76 GiB"
    )
    assert "rlhf.micro_batch_size" in outcome.advice("rlhf")
    alone = classify(AttemptFacts("rlhf", [rank(1, CLOSED, 2), rank(1, GLOO, 0)]))
    assert (alone.kind, alone.rank) == (OutcomeKind.COMMUNICATION, 2)


def test_a_rank_that_hung_and_was_killed_for_it_is_a_time_out_but_a_killed_one_is_itself():
    assert (
        classify(AttemptFacts("sft", [rank(1, GLOO, 0), rank(-9, "iteration 3/10", 1)])).kind
        is OutcomeKind.COMMUNICATION
    )
    killed = classify(AttemptFacts("sft", [rank(1, CLOSED, 0), rank(-9, "iteration 3/10", 1)]))
    assert (killed.kind, killed.rank) == (OutcomeKind.KILLED, 1)


def test_memory_that_ran_out_is_told_in_the_words_of_the_kernel():
    outcome = classify(AttemptFacts("sft", [rank(-9, "iteration 7/10", 3)], [OOM_STEP]))
    assert "rank 3: killed by SIGKILL" in outcome.cause and "oom_kill event" in outcome.cause


@pytest.mark.parametrize(
    "words, kind",
    [
        ("PREEMPTION", OutcomeKind.PREEMPTED),
        ("TIME LIMIT", OutcomeKind.TIME_LIMIT),
        ("NODE FAILURE, SEE SLURMCTLD LOG FOR DETAILS", OutcomeKind.NODE_FAILURE),
    ],
)
def test_what_slurm_did_comes_before_what_the_ranks_saw(words, kind):
    lines = [STEP.format(words)]
    action = derive_action(None, 0, lines).kind
    lost = classify(
        AttemptFacts(
            "sft", [rank(-15, "iteration 7/10"), rank(1, CLOSED, 1)], lines, slurm_action=action, before=0, after=5
        )
    )
    assert (
        lost.kind is kind
        and lost.may_requeue
        and "ended without saving" in lost.cause
        and "last checkpoint: iteration 5" in lost.cause
    )
    kept = classify(
        AttemptFacts(
            "sft",
            [rank(75, "stopped by a signal; iteration 7 is saved")],
            lines,
            slurm_action=action,
            before=0,
            after=7,
        )
    )
    assert kept.kind is kind and "; saved iteration 7" in kept.cause


def test_a_fault_during_the_save_that_was_asked_for_keeps_its_own_name():
    gate = classify(
        AttemptFacts("rlhf", [rank(76, "error: paused by a health gate: ...")], stop_reason=OutcomeKind.TIME_LIMIT)
    )
    assert gate.kind is OutcomeKind.UNHEALTHY and not gate.may_requeue
    outcome = classify(AttemptFacts("sft", [rank(1, FULL)], stop_reason=OutcomeKind.TIME_LIMIT))
    assert outcome.kind is OutcomeKind.DISK_FULL and not outcome.may_requeue


@pytest.mark.parametrize("stop_reason", [OutcomeKind.STOPPED, OutcomeKind.CANCELLED])
def test_what_a_person_asked_for_is_not_queued_again(stop_reason):
    outcome = classify(AttemptFacts("sft", [rank(75, "saved")], stop_reason=stop_reason, before=1, after=3))
    assert outcome.kind is stop_reason and not outcome.may_requeue and "saved iteration 3" in outcome.cause


def test_every_ending_but_done_says_what_to_do():
    assert set(ADVICE) == {kind.value for kind in OutcomeKind} - {"done"}


def test_lead_is_the_longest_step_and_save_with_margin():
    """30 s steps; the save after iteration 2 took 200 s, so that row 3 came 230 s after row 2. The
    queue between 3 and 4 is no step."""
    rows = [
        {"iteration": 1, "time": 1000.0},
        {"iteration": 2, "time": 1030.0},
        {"iteration": 3, "time": 1260.0, "save_s": 200.0},
        {"iteration": 4, "time": 9000.0},
    ]
    wanted = 230 + deadline.SAVE_FACTOR * 200 + deadline.MARGIN_S
    assert deadline.save_lead_s(rows, [900.0, 8900.0], 300, 7200) == wanted
    assert deadline.save_lead_s(rows, [900.0, 8900.0], 300, 600) == 300, "half of a short limit"
    assert deadline.save_lead_s(rows[:2], [900.0], 300, 7200) == 300, "no save was measured"
    assert deadline.save_lead_s([], [], 300, 600) == 150


def follow(
    *ends, attempts=2, max_attempts=20, kind=OutcomeKind.COMMUNICATION, stage=ALL["sft"], moved=False, **options
):
    """What follows one more attempt of ``kind`` that began at 5, after earlier ends (class, began,
    iteration)."""
    rows = tuple({"class": name, "began": began, "iteration": after} for name, began, after in ends)
    history = requeue.History(attempts, rows)
    return requeue.decide(
        Outcome(kind, GLOO), history, stage, max_attempts, progress=requeue.AttemptProgress(moved, 5), **options
    )


@pytest.mark.parametrize(
    "ends, moved, kind",
    [
        ([], False, OutcomeKind.COMMUNICATION),
        ([("communication timeout", 3, 5)], False, OutcomeKind.COMMUNICATION),
        ([("communication timeout", 5, 5)], False, OutcomeKind.NO_PROGRESS),
        ([("communication timeout", 5, 5)], True, OutcomeKind.COMMUNICATION),
        ([("preempted", 5, 5)], False, OutcomeKind.COMMUNICATION),
        ([("time limit", None, None), ("preempted", 5, 5)], False, OutcomeKind.NO_PROGRESS),
    ],
)
def test_two_attempts_without_progress_are_enough(ends, moved, kind):
    state, outcome = follow(*ends, moved=moved)
    assert outcome.kind is kind and state == ("failed" if kind is OutcomeKind.NO_PROGRESS else "requeued")
    assert "Timed out waiting 1800000ms" in outcome.cause and (outcome.code == 75) == (state == "requeued")


def test_attempts_have_a_limit_that_a_resume_resets(tmp_path):
    state, outcome = follow(attempts=5, max_attempts=5, moved=True)
    assert state == "failed" and "attempt 5 of at most 5 (profile: max_attempts)" in outcome.cause
    rows = [
        {"event": "started", "stage": "sft"},
        {"event": "requeued", "stage": "sft", "class": "preempted"},
        {"event": "started", "stage": "sft"},
        {"event": "vanished", "stage": "sft", "class": "node failure"},
    ]
    assert requeue.history_of(rows, "sft") == requeue.History(2, (rows[1], rows[3]))
    assert requeue.history_of([*rows, {"event": "submitted", "stage": "sft"}], "sft") == requeue.History()


@pytest.mark.parametrize("stage", ALL.values(), ids=ALL)
def test_every_stage_is_queued_again_at_its_time_limit(stage):
    """Each saves what it has done on USR1; a stage that would not says why it isn't queued
    again."""
    assert follow(kind=OutcomeKind.TIME_LIMIT, stage=stage)[0] == "requeued"
    state, outcome = follow(kind=OutcomeKind.TIME_LIMIT, stage=dataclasses.replace(stage, resumable=False))
    assert state == "failed" and "saves nothing on its way" in outcome.cause


def test_what_was_done_or_cancelled_meanwhile_comes_before_the_limits():
    assert follow(attempts=9, max_attempts=5, action=SlurmAction(OutcomeKind.PREEMPTED, True))[0] == "requeued", (
        "Slurm has done it"
    )
    assert follow(cancelled=True)[0] == "cancelled" and follow(kind=OutcomeKind.DONE)[0] == "done"
    assert follow(kind=OutcomeKind.STOPPED)[0] == "stopped" and follow(kind=OutcomeKind.BUG)[0] == "failed"
    bad = [follow(*[("preflight", 5, 5)] * earlier, kind=OutcomeKind.PREFLIGHT)[0] for earlier in (1, 2)]
    assert bad == ["requeued", "failed"]


def job(state="RUNNING", reason="None", restarts=0, preempted=False):
    return JobFacts(state, reason, None, None, restarts, preempted)


@pytest.mark.parametrize(
    "facts, terminated, action",
    [
        (job("COMPLETING", restarts=1), True, SlurmAction(OutcomeKind.PREEMPTED, True)),
        (job("PENDING", restarts=1), False, SlurmAction(OutcomeKind.NODE_FAILURE, True)),
        (job(), True, SlurmAction(OutcomeKind.PREEMPTED)),
        (job(preempted=True), False, SlurmAction(OutcomeKind.PREEMPTED)),
        (job(), False, None),
        (job("PREEMPTED", preempted=True), True, SlurmAction(OutcomeKind.PREEMPTED)),
        (job("COMPLETING", preempted=True), True, SlurmAction(OutcomeKind.PREEMPTED)),
        (job("NODE_FAIL"), True, SlurmAction(OutcomeKind.NODE_FAILURE)),
        (job("COMPLETING", "NodeDown"), True, SlurmAction(OutcomeKind.NODE_FAILURE)),
        (job("COMPLETING", "TimeLimit"), True, SlurmAction(OutcomeKind.TIME_LIMIT)),
        (job("TIMEOUT"), False, SlurmAction(OutcomeKind.TIME_LIMIT)),
        (job("CANCELLED"), False, SlurmAction(OutcomeKind.CANCELLED)),
        (job("COMPLETING"), True, SlurmAction(OutcomeKind.CANCELLED)),
        (job("COMPLETING"), False, None),
    ],
)
def test_what_slurm_did_to_the_job(facts, terminated, action):
    assert derive_action(facts, 0, terminated=terminated) == action


def test_what_slurm_printed_names_the_reason_of_its_requeue():
    lines = [STEP.format("NODE FAILURE")]
    assert derive_action(job("COMPLETING", restarts=3), 2, lines, True) == SlurmAction(OutcomeKind.NODE_FAILURE, True)
    assert (
        derive_action(None, 0, lines) == SlurmAction(OutcomeKind.NODE_FAILURE)
        and derive_action(None, 0, ["srun: error"]) is None
    )
    lost = ["srun: error: Node failure on 127.0.1.1"]  # a TERM alone would look like a preemption
    assert derive_action(job("COMPLETING", restarts=3), 2, lost, True) == SlurmAction(OutcomeKind.NODE_FAILURE, True)


def reporting(kind, message="", code=1):
    return RankExit(code, 0, "the last line", ("the last line",), LastWords(kind, message))


@pytest.mark.parametrize(
    "rank_exit, kind",
    [
        (
            reporting(OutcomeKind.JUDGE, "http://x: <urlopen error [Errno 111] Connection refused>; gave up"),
            OutcomeKind.JUDGE,
        ),
        (
            reporting(OutcomeKind.REFUSED, "iter_0000100/model/__0_0.distcp does not have the sha256", 65),
            OutcomeKind.REFUSED,
        ),
        (reporting(OutcomeKind.BUG, "OSError: Name or service not known"), OutcomeKind.BUG),
        (reporting(OutcomeKind.FILE_ERROR, "[Errno 13] Permission denied", 74), OutcomeKind.FILE_ERROR),
        (reporting(None, "RuntimeError: something that torch says"), OutcomeKind.BUG),
        (reporting(None, CUDA), OutcomeKind.CUDA_OOM),
        (reporting(None, GLOO), OutcomeKind.COMMUNICATION),
        (reporting(OutcomeKind.NAN, "FloatingPointError: not finite", -9), OutcomeKind.NAN),
    ],
)
def test_what_the_stage_says_of_itself_is_believed_first(rank_exit, kind):
    """Also before its exit code and before texts that elsewhere mean something else."""
    outcome = classify(AttemptFacts("mtbench", [rank_exit], ["srun: error: n1: Connection refused"]))
    assert outcome.kind is kind and outcome.advice("mtbench")
    assert rank_exit.last_words.message.split(";")[0][:100] in outcome.cause


def test_advice_names_only_keys_that_the_stage_has():
    """For every stage and every class that it can end with."""

    def keys(cls) -> set[str]:
        return {field.name for field in dataclasses.fields(cls)}

    named = 0
    for name, stage in ALL.items():
        for kind in ADVICE:
            if (kind in ("judge", "harness", "too few ratings") and name != "mtbench") or (
                kind == "health gate" and not stage.trainer
            ):
                continue
            for section, key in re.findall(r"(?<![\w.])((?:resources\.)?[a-z]+)\.([a-z_]+)\b", advice.of(kind, name)):
                if section.startswith("resources."):
                    assert section == f"resources.{name}" and key in keys(Resources), (kind, name)
                elif section in SECTIONS:
                    assert section in (name, "data") and key in keys(SECTIONS[section]), f"{kind}: {section}.{key}"
                else:
                    assert (section, key) == ("metrics", "jsonl"), f"{kind}: {section}.{key}"
                named += 1
    assert named > 60


@pytest.mark.parametrize(
    "text, wanted, visible, reason",
    [
        ("0, GPU-a, 4, 0\n1, GPU-b, 4, 0\n", 2, "0,1", ""),
        ("0, GPU-a, 4, [N/A]\n1, GPU-b, 560, [N/A]\n", 2, "0,1", ""),
        ("0, GPU-a, 4, 0\n", 2, "0", "1 GPU(s) visible, 2 asked for"),
        ("0, GPU-a, 4, 0\n1, GPU-b, 40960, 0\n", 2, "0,1", "GPU 1 is not empty: 40960 MiB in use"),
        ("0, GPU-a, 4, 0\n1, GPU-b, 4, 2\n", 2, "", "GPU 1 has 2 uncorrected memory errors"),
        # another job's: no cgroup hides it
        ("0, GPU-a, 4, 0\n1, GPU-b, 4, 0\n2, GPU-c, 41000, 0\n", 2, "0,1", ""),
        ("0, GPU-a, 4, 0\n1, GPU-b, 4, 0\n2, GPU-c, 41000, 0\n", 2, "GPU-a,GPU-b", ""),
        ("0, GPU-a, 4, 0\n1, GPU-b, 4, 0\n2, GPU-c, 41000, 0\n", 2, "1,2", "GPU 2 is not empty: 41000 MiB in use"),
        ("0, GPU-a, 4, 0\n1, GPU-b, 4, 0\n2, GPU-c, 41000, 0\n", 2, "", ""),
    ],
)
def test_rows_of_nvidia_smi(text, wanted, visible, reason):
    assert node_check.judge_gpus(text, wanted, visible) == reason


def health(node, gpu, check, bad="", tflops=600.0):
    return {"node": node, "gpu": gpu, "check": check, "bad": bad, **({"tflops": tflops} if check == "gpu" else {})}


def test_health_names_the_node_of_a_gpu_that_is_wrong_slow_or_silent():
    def rows(node, **changes):
        return [health(node, gpu, check) for gpu in (0, 1) for check in ("gpu", "node", "all")]

    nodes = ["n1", "n2"]
    assert preflight.judge_gpus(rows("n1") + rows("n2"), nodes, 2, 180) == ({}, "")
    wrong = [
        row | {"bad": "its matrix product is wrong"} if row["gpu"] == 1 and row["check"] == "gpu" else row
        for row in rows("n2")
    ]
    assert preflight.judge_gpus(rows("n1") + wrong, nodes, 2, 180)[0] == {"n2": "GPU 1: its matrix product is wrong"}
    slow = [row | {"tflops": 90.0} if row["gpu"] == 0 and row["check"] == "gpu" else row for row in rows("n2")]
    assert preflight.judge_gpus(rows("n1") + slow, nodes, 2, 180)[0] == {"n2": "GPU 0: 90 TFLOP/s, the others 600"}
    assert preflight.judge_gpus(rows("n1"), nodes, 2, 180)[0]["n2"].startswith("GPU 0: no answer")
    between = [row | {"bad": "timed out"} if row["check"] == "all" else row for row in rows("n1") + rows("n2")]
    assert preflight.judge_gpus(between, nodes, 2, 180) == ({}, "the all-reduce over 2 node(s) failed: timed out")


@pytest.mark.parametrize(
    "broken, found", [({"n3"}, {"n3"}), ({"n1"}, {"n1"}), ({"n5"}, {"n5"}), ({"n2", "n4"}, {"n2", "n4"})]
)
def test_pairs_find_the_node_that_an_all_reduce_fails_with(broken, found):
    nodes = ["n1", "n2", "n3", "n4", "n5", "n6"] if len(broken) == 1 else ["n1", "n2", "n3", "n4", "n5", "n6", "n7"]
    assert set(preflight.find_bad_node_by_pairs(nodes, lambda some: not broken & set(some), "timed out")) == found


def test_nodes_that_nobody_can_reach_are_blamed_not_the_others():
    unreached = "network: can't reach the first node at n1: timed out"
    assert preflight.attribute_network_failures(["n1", "n2", "n3"], {"n2": unreached, "n3": unreached}) == {
        "n1": "network: no other node can reach it"
    }
    assert preflight.attribute_network_failures(["n1", "n2", "n3"], {"n3": unreached}) == {"n3": unreached}
    silent = {"n1": "did not answer within 90 s", "n2": "network: the first node told no one where it listens"}
    assert preflight.attribute_network_failures(["n1", "n2"], silent) == {"n1": "did not answer within 90 s"}


@pytest.mark.parametrize(
    "lines, expected",
    [
        (
            ["srun: error: n2: task 3: Exited with exit code 9", "srun: error: n1: task 0: Exited with exit code 1"],
            [(3, 9), (0, 1)],
        ),
        (["srun: error: n1: tasks 0-1,3: Exited with exit code 75"], [(0, 75), (1, 75), (3, 75)]),
        (["srun: error: n1: task 1: Killed", "srun: error: n1: task 0: Terminated"], [(1, -9), (0, -15)]),
        (["srun: error: n1: task 1: Segmentation fault (core dumped)"], [(1, -11)]),
        (["srun: error: nid001277: tasks 1-2: Out Of Memory"], [(1, -9), (2, -9)]),
        (["srun: Job step aborted: Waiting up to 32 seconds for job step to finish."], []),
    ],
)
def test_ends_in_the_words_of_srun(lines, expected):
    assert [found for line in lines for found in ends(line)] == expected


def test_last_word_of_a_rank_is_its_exception(tmp_path):
    log = Log(tmp_path / "log")
    for text in (
        "iteration 3",
        "Traceback (most recent call last):",
        '  File "x.py"',
        "torch.OutOfMemoryError: tried 2 GiB",
        "bye",
    ):
        log.write(1, text)
    for text in (
        "[rank2]: Traceback",
        "[rank2]:     assert loss > 0",
        "[rank2]:            ^^^^^^^^",
        "[rank2]: AssertionError",
    ):
        log.write(2, text)
    assert log.rank_exit(1, 1).describe() == "rank 1: exit code 1: torch.OutOfMemoryError: tried 2 GiB"
    assert log.rank_exit(1, 1).lines == (
        "iteration 3",
        "Traceback (most recent call last):",
        'File "x.py"',
        "torch.OutOfMemoryError: tried 2 GiB",
        "bye",
    )
    assert log.rank_exit(2, 1).line == "AssertionError at `assert loss > 0`"
    log.close()
    stamped = (tmp_path / "log").read_text().splitlines()
    assert [line.partition(" ")[2] for line in stamped[:2]] == [
        "[1] iteration 3",
        "[1] Traceback (most recent call last):",
    ]


def test_a_port_that_a_stranger_holds_is_stepped_over():
    with socket.create_server(("", 0)) as stranger:
        taken = stranger.getsockname()[1]
        assert job_port(taken - 20000, here=False) == 20000 + (taken - 20000) % 12000
    with contextlib.ExitStack() as stack:
        while True:
            try:
                stack.enter_context(socket.create_server(("", job_port(7, here=True))))
                break
            except OSError:
                continue
        assert 20007 < job_port(7, here=True) < 20007 + PORTS


def test_a_row_of_metrics_that_is_half_written_is_passed_over(tmp_path):
    (tmp_path / "sft").mkdir()
    rows = [{"iteration": 1, "time": 5.0}, {"iteration": 2, "time": 6.0}]
    (tmp_path / "sft/metrics.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows) + '{"iteration": 3, "ti'
    )
    assert progress.rows(Run(tmp_path), "sft", deadline.ROWS_BYTES) == rows
