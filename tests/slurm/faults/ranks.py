"""What a rank can do to its stage."""

from __future__ import annotations

import json
import os
import signal

from tests.slurm.faults.case import Case, scenario


def _resumed(case: Case, *stages: str) -> str:
    case.resume()
    case.done(*stages)
    return "; resumed: done"


@scenario("rank killed (kill -9)")
def rank_killed(case: Case) -> str:
    case.project.behave(sft={"step_s": 0.2})
    case.submit("--until", "reward", sets={"sft.iterations": 20})
    case.begun("sft", 2)
    os.kill(case.rank("sft", 1)["pid"], signal.SIGKILL)
    case.inject()
    cause = case.fails("sft", "rank 1", "SIGKILL")
    assert not case.has("reward/rank_0.json"), "the child of a failed stage ran"
    return cause + _resumed(case, "sft", "reward")


@scenario("rank ends by a segmentation fault")
def rank_segfault(case: Case) -> str:
    case.project.behave(sft={"step_s": 0.2, "signal_at": 3, "signal": int(signal.SIGSEGV), "rank": 1})
    case.submit("--until", "reward", sets={"sft.iterations": 6})
    case.begun("sft", 2)
    case.inject()
    cause = case.fails("sft", "rank 1", "SIGSEGV")
    assert not case.has("reward/rank_0.json"), "the child of a failed stage ran"
    return cause + _resumed(case, "sft", "reward")


@scenario("rank ends with os._exit(0) before the last iteration")
def rank_exits_0(case: Case) -> str:
    case.project.behave(sft={"step_s": 0.2, "exit_at": 3})
    case.submit("--until", "reward", sets={"sft.iterations": 5})
    case.begun("sft", 2)
    case.inject()
    cause = case.fails("sft", "exited 0 at iteration 2 of 5")
    assert not case.has("reward/rank_0.json"), "the child of a failed stage ran"
    return cause + _resumed(case, "sft", "reward")


@scenario("rank hangs; the others' collective times out after 2 s", seconds=15)
def rank_hangs(case: Case) -> str:
    case.project.behave(sft={"step_s": 0.2, "hang_at": 3, "rank": 1})
    case.submit("--until", "reward", sets={"sft.iterations": 6})
    case.begun("sft", 2)
    case.inject()
    case.notice(lambda: case.state("sft") in ("failed", "requeued"), 40, "the hang is seen")
    first = case.status("sft")
    assert "Timed out waiting" in first["cause"] or first.get("class") == "communication timeout", first
    if first["state"] == "requeued":
        case.done("sft", "reward")
        return f"requeued: {first['cause']}; done"
    return case.fails("sft") + _resumed(case, "sft", "reward")


@scenario("500 ranks' worth of log lines (100,000), then a failure", seconds=20)
def many_log_lines(case: Case) -> str:
    """8 ranks print what 500 would in a few iterations; then rank 5 fails, and its words are among
    the others'.

    Iterations take a while: what a rank writes right before it fails srun may drop, as it ends the
    step at once, and ranks that wait for no one could all be through before that.
    """
    case.project.behave(sft={"lines": 3125, "fail_at": 4, "rank": 5, "step_s": 0.5})
    case.submit(
        "--until", "sft", sets={"sft.iterations": 5, "resources.sft.gpus_per_node": 8, "sft.global_batch_size": 32}
    )
    case.until(lambda: case.has("sft/rank_7.json"), 30, "start of the ranks")
    case.inject()
    cause = case.fails("sft", "rank 5", "loss is nan at iteration 4", seconds=60)
    # without the time
    lines = [line.partition(" ")[2] for line in case.project.log("sft").splitlines()]
    # srun passes on what was written before the end, in order and whole; only the last line may be
    # cut by a kill
    for rank in (0, 3, 5, 7):
        mine = [line for line in lines if line.startswith(f"[{rank}] iteration ")]
        whole = [f"[{rank}] iteration {iteration} line {number}" for iteration in range(1, 6) for number in range(3125)]
        kept = mine if rank == 5 else mine[:-1]
        assert kept == whole[: len(kept)], f"rank {rank}: lines lost, torn or out of order"
        assert rank != 5 or len(mine) == 3 * 3125, (
            f"rank 5 wrote three iterations' lines before it failed, the log has {len(mine)}"
        )
    case.check(case.project.convoy("logs", "demo", "sft"))
    rows = [json.loads(line) for line in (case.run / "ledger.jsonl").read_text().splitlines()]
    assert max(len(json.dumps(row)) for row in rows) < 4000, "the log is not to be found in the ledger"
    return f"{cause}; {len(lines)} lines whole"


@scenario("a rank says itself what is wrong, in words that mean something else elsewhere")
def rank_speaks(case: Case) -> str:
    case.project.behave(sft={"words": ["nan", "FloatingPointError: not finite; Connection refused"]})
    case.submit("--until", "reward")
    case.inject()
    cause = case.fails("sft", "FloatingPointError: not finite")
    assert case.status("sft")["class"] == "nan", case.status("sft")
    return cause
