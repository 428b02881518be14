"""The merged log: order, ranks, what is put together and that nothing is lost. Files are written,
no rank is started."""

import collections
import json
import re
from datetime import datetime
from pathlib import Path

import pytest

from launcher.run.folder import Run, this_process, write_json
from launcher.status import logs
from launcher.status.log_groups import Groups, Line, collapsed, ranges
from training.errors import ConfigError


def line(second: float, rank: int, text: str) -> str:
    return f"2026-11-23T14:{int(second) // 60:02d}:{second % 60:06.3f} [{rank}] {text}\n"


@pytest.fixture
def run(tmp_path):
    """A run whose sft has had two attempts on two ranks."""
    made = Run(tmp_path)
    write_json(made.config_file, {"run": {"id": "hh-1", "profile": "local"}, "profile": {"scheduler": "local"}})
    folder = tmp_path / "sft" / "logs"
    folder.mkdir(parents=True)
    (folder / "attempt_1.log").write_text(line(1, 0, "hello") + line(1, 1, "hello") + line(2, 1, "first"))
    (folder / "attempt_2.log").write_text(
        line(11, 0, "hello")
        + line(12, 1, "Traceback (most recent call last):")
        + line(12, 0, "step 1")
        + line(12, 1, '  File "x.py", line 1')
        + line(12, 1, "ValueError: no")
        + "no stamp\n"
    )
    (folder / "supervise.log").write_text(
        "2026-11-23 14:00:00.500 sft attempt 1\n2026-11-23 14:00:10.900 sft attempt 2\n"
        "2026-11-23 14:00:13.000 sft failed\n"
    )
    (folder / "slurm-12.out").write_text(
        "2026-11-23 14:00:12.900 SIGTERM received\nslurmstepd: error: DUE TO TIME LIMIT\n"
    )
    for attempt, clock in ((1, "14:00:00.400"), (2, "14:00:10.800")):
        began = datetime.fromisoformat(f"2026-11-23T{clock}").timestamp()
        with open(made.folder / "ledger.jsonl", "a") as ledger:
            ledger.write(json.dumps({"time": began, "event": "started", "stage": "sft", "attempt": attempt}) + "\n")
    return made


def test_newest_attempt_in_order_of_time_with_the_supervisor_s_and_slurm_s_words(run):
    assert list(logs.show(run, "sft"))[1:] == [
        "11-23 14:00:11 [0] hello",
        "11-23 14:00:12 [1] Traceback (most recent call last):",
        "11-23 14:00:12 [0] step 1",
        '11-23 14:00:12 [1]   File "x.py", line 1',
        "11-23 14:00:12 [1] ValueError: no",
        "11-23 14:00:12 [?] no stamp",
        "11-23 14:00:12 [launcher] SIGTERM received",
        "11-23 14:00:12 [slurm] slurmstepd: error: DUE TO TIME LIMIT",
        "11-23 14:00:13 [launcher] sft failed",
    ]


def test_one_attempt_all_attempts_and_one_that_is_not_there(run):
    assert [text[15:] for text in logs.show(run, "sft", "1")] == [
        "[launcher] sft attempt 1",
        "[0-1] hello",
        "[1] first",
    ]
    assert len(list(logs.show(run, "sft", "all"))) == 13
    with pytest.raises(ConfigError, match="--attempt 3: sft of .* has attempts 1, 2; or all"):
        list(logs.show(run, "sft", "3"))
    with pytest.raises(ConfigError, match="reward of .* has written no log yet"):
        list(logs.show(run, "reward"))


def test_errors_are_whole_tracebacks_and_lines_that_look_like_one(run):
    assert [text[15:] for text in logs.show(run, "sft", choice=logs.Choice(errors=True))] == [
        "[1] Traceback (most recent call last):",
        '[1]   File "x.py", line 1',
        "[1] ValueError: no",
        "[launcher] SIGTERM received",
        "[slurm] slurmstepd: error: DUE TO TIME LIMIT",
    ]


def test_a_setting_named_after_errors_is_none():
    said = logs.parse(
        "2026-11-23 14:00:00.500 TORCH_NCCL_ASYNC_ERROR_HANDLING=1  # a rank whose peer died ends",
        "sft",
        "launcher",
        "",
    )
    assert not logs.Choice(errors=True).wants(said)


@pytest.mark.parametrize(
    "ranks, expected", [("1", {"1"}), ("0-1", {"0", "1"}), ("0,launcher", {"0", "launcher"}), ("slurm", {"slurm"})]
)
def test_ranks_are_chosen(run, ranks, expected):
    assert {re.search(r"\[(.*?)\]", text)[1] for text in logs.show(run, "sft", choice=logs.Choice(ranks))} == expected


def test_a_rank_that_is_none_is_named():
    with pytest.raises(ConfigError, match="--rank 0,x7: 'x7' is no rank"):
        logs.Choice("0,x7")


@pytest.mark.parametrize("last", [0, 3])
def test_ranks_that_wrote_nothing_are_an_error_that_names_those_there_are(run, last):
    with pytest.raises(ConfigError, match="--rank 99: no line is of these; the log has lines of 0-1, launcher, slurm"):
        list(logs.show(run, "sft", choice=logs.Choice("99"), last=last))
    assert list(logs.show(run, "sft", choice=logs.Choice("0", errors=True))) == [], "rank 0 wrote, but no error"


def test_tail_and_all_stages(run):
    assert [text[15:] for text in logs.show(run, "sft", last=1)] == ["[launcher] sft failed"]
    assert "sft [0] hello" in "\n".join(logs.show(run, "all"))


def test_500_ranks_lines_are_put_together_in_each_rank_s_order_and_none_is_lost(run):
    """As 500 ranks write: the same texts, each rank a little later than the one before, one of them
    with a text of its own."""
    texts = [f"step {step}" for step in range(100)]
    wrote = [(second, rank, text) for second, text in enumerate(texts) for rank in range(500)]
    wrote.insert(20_123, (40, 123, "loss is nan"))
    log = run.stage("sft") / "logs" / "attempt_3.log"
    log.write_text("".join(line(second + rank / 600, rank, text) for second, rank, text in wrote))
    shown = [text[15:] for text in logs.show(run, "sft", "3")]
    assert shown.count("[123] loss is nan") == 1
    whole = [text for text in shown if text.startswith("[0-499] step ")]
    assert len(whole) > 95, "one line for 500 ranks, save around the one that differs"
    told = collections.defaultdict(list)
    for text in shown:
        tags, words = re.fullmatch(r"\[(.*?)\] (.*)", text).groups()
        for part in tags.split(","):
            first, _, end = part.partition("-")
            for rank in range(int(first), int(end or first) + 1) if first.isdigit() else ():
                told[rank].append(words)
    assert all(told[rank] == [text for _, one, text in wrote if one == rank] for rank in (0, 1, 122, 123, 124, 499))
    assert sum(map(len, told.values())) == len(wrote)


def test_a_line_is_not_put_before_one_that_its_rank_wrote_earlier():
    """Rank 1 says b before a, rank 0 a before b: to merge both would turn one of them round."""
    groups = Groups()
    rows = [
        Line("2026-11-23T14:00:00.000", "sft", rank, text)
        for rank, text in (("0", "a"), ("0", "b"), ("1", "b"), ("1", "a"))
    ]
    out = [(tuple(group.tags), group.line.text) for row in rows for group in groups.add(row)]
    out += [(tuple(group.tags), group.line.text) for group in groups.rest()]
    assert out == [(("0",), "a"), (("0", "1"), "b"), (("1",), "a")]


def test_a_text_that_one_rank_repeats_stays_repeated():
    rows = [Line("2026-11-23T14:00:00.000", "sft", "0", "again")] * 3
    assert [group.tags for group in collapsed(rows)] == [["0"]] * 3


@pytest.mark.parametrize(
    "tags, text", [(["3"], "3"), (["0", "1", "2"], "0-2"), (["7", "0", "1"], "0-1,7"), (["srun"], "srun")]
)
def test_ranges(tags, text):
    assert ranges(tags) == text


def test_follow_shows_what_comes_into_files_that_begin_later_and_ends_with_the_stage(run, monkeypatch):
    log, states = run.stage("sft") / "logs" / "attempt_2.log", []
    write_json(
        run.stage("sft") / "status.json", {"state": "running", "attempt": 2, "job": None, "cause": "", **this_process()}
    )

    def more(text: str, path=log) -> None:
        with open(path, "a") as file:
            file.write(text)

    steps = iter(
        [
            lambda: more(line(20, 0, "later") + "2026-11-23T14:00:21.000 [1] half"),
            lambda: (more(" a line\n"), more(line(30, 0, "third"), log.with_name("attempt_3.log"))),
            lambda: (run.write_status("sft", state="failed", cause="x", job=None), run.record("failed", stage="sft")),
        ]
    )
    monkeypatch.setattr(logs.time, "sleep", lambda _seconds: states.append(next(steps, lambda: None)()))
    shown = [text[15:] for text in logs.follow(run, "sft")]
    assert shown[0] == "[launcher] sft attempt 2" and "[1] first" not in shown, "only the newest attempt"
    assert [shown.count(text) for text in ("[0] hello", "[0] later", "[1] half a line", "[0] third")] == [1, 1, 1, 1]
    assert len(states) < 10


def bytes_read(action) -> int:
    """Bytes that this process asked the kernel for meanwhile."""

    def so_far() -> int:
        return int(re.search(r"rchar: (\d+)", Path("/proc/self/io").read_text())[1])

    before = so_far()
    action()
    return so_far() - before


def test_the_last_lines_of_a_large_log_cost_what_they_hold(run, monkeypatch):
    """A file of 1 GiB: a hole, then 3,000 lines of eight ranks."""
    log = run.stage("sft") / "logs" / "attempt_3.log"
    with open(log, "wb") as file:
        file.truncate(1 << 30)
        file.seek(0, 2)
        file.write(
            b"\n"
            + "".join(
                line(20 + second / 100, rank, f"step {second}") for second in range(375) for rank in range(8)
            ).encode()
        )
    shown = []
    assert bytes_read(lambda: shown.extend(logs.show(run, "sft", last=5))) < 8 << 20
    assert [text[15:] for text in shown] == [f"[0-7] step {step}" for step in range(370, 375)]
    write_json(run.stage("sft") / "status.json", {"state": "failed", "attempt": 3, "job": None, "cause": "x"})
    monkeypatch.setattr(logs.time, "sleep", lambda _seconds: None)
    shown.clear()
    assert bytes_read(lambda: shown.extend(logs.follow(run, "sft", last=3))) < 16 << 20
    assert [text[15:] for text in shown] == [f"[0-7] step {step}" for step in range(372, 375)]


@pytest.mark.parametrize("last", [1, 3, 50, 5000])
@pytest.mark.parametrize("ranks", ["", "1", "launcher"])
def test_the_last_lines_are_those_of_the_log_read_from_its_beginning(run, monkeypatch, last, ranks):
    monkeypatch.setattr(logs, "TAIL_BYTES", 300)
    log = run.stage("sft") / "logs" / "attempt_3.log"
    log.write_text(
        "".join(
            line(20 + number / 50, number % 3, f"text {number // 5}") + "no stamp\n" * (number % 40 == 0)
            for number in range(1000)
        )
    )
    whole = list(logs.show(run, "sft", "all", logs.Choice(ranks)))
    assert list(logs.show(run, "sft", "all", logs.Choice(ranks), last=last)) == whole[-last:]


def test_a_line_without_an_end_is_taken_in_pieces(run):
    log = run.stage("sft") / "logs" / "attempt_3.log"
    with open(log, "wb") as file:
        file.write(b"2026-11-23T14:00:00.000 [0] " + b"x" * (5 << 20))
    assert max(map(len, logs.show(run, "sft", "3"))) <= (1 << 20) + 50
