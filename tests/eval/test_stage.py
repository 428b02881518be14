"""``python -m eval`` from end to end on two tiny models, and the page that it writes."""

import errno
import html.parser
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from eval.evaluation import main
from eval.files.jsonl import dump, read
from eval.report import curves, figures
from eval.work_split import exclusive
from tests.support.evaluations import prepare
from tests.support.judge import good

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def done(folders, judge, tmp_path_factory) -> Path:
    config = prepare(tmp_path_factory.mktemp("runs"), folders, reward_model=str(judge))
    assert main([str(config)]) == 0
    return config


def reuse(done: Path, config: Path) -> str:
    """Copy what the models of ``done`` have said beside ``config``; returns the path of ``config``
    for ``main``."""
    for name in ("model_answer", "heldout"):
        shutil.copytree(done.parent / name, config.parent / name)
    return str(config)


def without_time(path: Path) -> list[dict]:
    return [{key: value for key, value in row.items() if key != "tstamp"} for row in read(path)]


def test_answers_are_in_fastchats_schema(done):
    for name in ("sft", "rlhf"):
        rows = read(done.parent / "model_answer" / f"{name}.jsonl")
        assert [row["question_id"] for row in rows] == list(range(1, 25))
        assert all(
            set(row) >= {"question_id", "answer_id", "model_id", "choices", "tstamp"} and row["model_id"] == name
            for row in rows
        )
        assert all(row["choices"][0]["index"] == 0 and len(row["choices"][0]["turns"]) == 2 for row in rows)


def test_progress_ends_at_its_total(done):
    rows = read(done.parent / "metrics.jsonl")
    assert rows[-1]["iteration"] == rows[-1]["total"] == 2 * (24 + 4) + 4
    assert all(before["iteration"] < after["iteration"] for before, after in zip(rows, rows[1:], strict=False))


def test_results_hold_the_numbers(done):
    found = json.loads((done.parent / "results.json").read_text())
    kl = [row["kl"] for row in read(done.parent / "heldout/kl/rlhf.jsonl")]
    assert found["heldout"]["kl"]["rlhf"]["mean"] == pytest.approx(sum(kl) / 4)
    gold = {name: [row["gold"] for row in read(done.parent / f"heldout/{name}.jsonl")] for name in ("sft", "rlhf")}
    assert found["heldout"]["gold_difference"]["rlhf"]["mean"] == pytest.approx(
        (sum(gold["rlhf"]) - sum(gold["sft"])) / 4
    )
    score = {
        name: {row["index"]: row["score"] for row in read(done.parent / f"heldout/score/{name}.jsonl")} for name in gold
    }
    won = [
        (score["rlhf"][index] > score["sft"][index]) + (score["rlhf"][index] == score["sft"][index]) / 2
        for index in range(4)
    ]
    assert found["heldout"]["score"]["sft"]["mean"] == pytest.approx(sum(score["sft"].values()) / 4)
    assert found["heldout"]["win_rate"]["rlhf"]["mean"] == sum(won) / 4 and set(found["heldout"]["win_rate"]) == {
        "rlhf"
    }
    assert 0 <= found["heldout"]["length_controlled"]["rlhf"]["mean"] <= 1
    assert len(set(found["heldout"]["scored_by"].values())) == 1 and set(found["heldout"]["scored_by"]) == {
        "sft",
        "rlhf",
    }
    assert "By the reward model of the evaluation" in (done.parents[1] / "report.html").read_text()
    assert found["reward_model"]["reward"]["accuracy"] == 0.875 and found["reward_model"]["reward"]["iteration"] == 2
    assert found["checks"]["questions"]["sft"]["texts"] == 48 and found["scores"] is None


def test_without_a_judge_the_table_is_what_is_missing_and_no_number(done):
    table = (done.parent / "table.md").read_text()
    assert "Convoy questions · judge: none" in table and "no score" in table and "mtbench.judge_url" in table
    assert re.findall(r"\d+\.\d+", table) == [] and "MT-Bench" not in table
    assert (done.parent / "table.csv").read_text().splitlines() == [
        "Model,Coding,Extraction,Humanities,Math,Reasoning,Roleplay,STEM,Writing,Avg,Macro,Valid"
    ]


class Page(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.attributes, self.text = set(), [], ""

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.attributes += attributes

    def handle_data(self, data):
        self.text += data


def test_the_report_is_one_page_that_loads_nothing(done):
    source = (done.parent.parent / "report.html").read_text()
    page = Page()
    page.feed(source)
    links = [
        value
        for name, value in page.attributes
        if name in ("src", "href", "xlink:href", "srcset", "action", "data", "poster")
    ]
    assert links and all(link.startswith("#") for link in links)
    assert "@import" not in source and all(place.startswith("#") for place in re.findall(r"url\(([^)]*)\)", source))
    assert not page.tags & {"link", "iframe", "img", "object", "embed", "base"}
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids)) and {link[1:] for link in links} <= set(ids)


def test_the_report_escapes_and_says_what_there_is(done):
    source = (done.parent.parent / "report.html").read_text()
    page = Page()
    page.feed(source)
    assert (
        "<script>alert(0)</script> & why?" in page.text
        and "&lt;script&gt;alert(0)" in source
        and "nice &lt;run&gt;" in source
    )
    assert "No judge has rated the answers" in page.text and "MT-Bench" not in page.text
    for text in (
        "87.5%",
        "81.0%, 92.0%",
        "56.2%",
        "2.250",
        "4.500",
        "KL(rlhf ‖ sft)",
        "Loss, nats",
        "Margin, chosen less rejected",
        "KL to the reference, nats a response",
        "Shares of responses",
    ):
        assert text in page.text, text
    assert 'class="radar"' not in source


def test_a_model_may_be_called_as_another_ones_kl_once_was(done, folders, tmp_path):
    rlhf = folders["rlhf"]
    config = prepare(tmp_path, {"sft": folders["sft"], "rlhf": rlhf, "rlhf_kl": rlhf})
    reuse(done, config)
    for name in ("model_answer", "heldout"):
        rows = read(config.parent / name / "rlhf.jsonl")
        dump(
            config.parent / name / "rlhf_kl.jsonl",
            [row | ({"model_id": "rlhf_kl"} if "model_id" in row else {}) for row in rows],
        )
    assert main([str(config)]) == 0
    found = json.loads((config.parent / "results.json").read_text())["heldout"]["kl"]
    assert found["rlhf"] == found["rlhf_kl"] and len(read(config.parent / "heldout/rlhf_kl.jsonl")) == 4


def test_a_second_start_makes_nothing_and_writes_the_same_page(done, monkeypatch):
    before = {
        path: path.read_bytes()
        for path in done.parent.parent.rglob("*")
        if path.is_file() and path.name != "metrics.jsonl"
    }
    monkeypatch.setattr("eval.answers.generation.load", None)  # a call would fail
    assert main([str(done)]) == 0
    assert {path: path.read_bytes() for path in before} == before


def test_only_what_is_missing_or_torn_is_made_again(done, folders, tmp_path):
    config = prepare(tmp_path, folders)
    reuse(done, config)
    torn = config.parent / "model_answer/rlhf.jsonl"
    torn.write_bytes(torn.read_bytes()[:-20])
    assert main([str(config)]) == 0
    assert without_time(config.parent / "model_answer/rlhf.jsonl") == without_time(
        done.parent / "model_answer/rlhf.jsonl"
    )
    assert (config.parent / "model_answer/sft.jsonl").read_bytes() == (
        done.parent / "model_answer/sft.jsonl"
    ).read_bytes()


def test_a_signal_stops_it_with_75_and_the_next_start_ends_where_an_unbroken_run_would(done, folders, tmp_path):
    config = prepare(tmp_path, folders, batch_size=1)
    process = subprocess.Popen(
        [sys.executable, "-m", "eval", str(config)],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    progress = config.parent / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while not progress.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(60) == 75 and not (config.parent / "results.json").exists()
    assert main([str(config)]) == 0
    for name in ("model_answer/sft.jsonl", "model_answer/rlhf.jsonl", "heldout/sft.jsonl", "heldout/rlhf.jsonl"):
        assert without_time(config.parent / name) == without_time(done.parent / name)


START = "import sys; from eval.evaluation import main; sys.exit(main(sys.argv[1:]))"
ELSEWHERE = (
    """import pathlib
glob = pathlib.Path.glob
pathlib.Path.glob = lambda self, pattern: (path for path in glob(self, pattern) if "rank-1" not in str(path))
""",
    """from eval.files import fingerprint
fingerprint.of_model = None
""",
)
"""On two nodes rank 0's listing of a folder does not show what rank 1 has just written; rank 1 must
not hash any model."""


def test_two_ranks_make_what_one_makes(done, folders, judge, tmp_path):
    """From what an earlier start on other ranks has left, too: a part file is taken over, and gone
    in the end."""
    config = prepare(tmp_path, folders, reward_model=str(judge))
    rows = read(done.parent / "model_answer/sft.jsonl")
    dump(config.parent / "model_answer/rank-5/sft.jsonl", rows[7:9])
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = os.environ | {
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", ELSEWHERE[rank] + START, str(config)],
            cwd=ROOT,
            text=True,
            env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
        )
        for rank in (0, 1)
    ]
    said = [rank.communicate(timeout=280)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0]
    for name in ("model_answer/sft", "model_answer/rlhf", "heldout/sft", "heldout/rlhf"):
        assert without_time(config.parent / f"{name}.jsonl") == without_time(done.parent / f"{name}.jsonl")
    assert (
        not list(config.parent.rglob("rank-*")) and "questions answered: 24/24" in said[0] and "answered" not in said[1]
    )
    for name, field in (("kl/rlhf", "kl"), ("score/rlhf", "score")):
        mine, alone = (read(place.parent / f"heldout/{name}.jsonl") for place in (config, done))
        assert [row[field] for row in mine] == pytest.approx([row[field] for row in alone], abs=1e-5)
    last = read(config.parent / "metrics.jsonl")[-1]
    assert last["iteration"] == last["total"]


def test_judged_from_end_to_end(done, folders, tmp_path, serve, capsys):  # noqa: F811
    server = serve(rest=good("Rating: [[6]]"))
    config = prepare(tmp_path, folders, judge="openai", judge_url=server.url, judge_model="judge")
    assert main([reuse(done, config)]) == 0
    found = json.loads((config.parent / "results.json").read_text())
    assert found["scores"]["models"]["sft"]["micro"]["mean"] == 6 and found["judge"]["returned"] == ["judge-0613"]
    page = Page()
    page.feed((config.parents[1] / "report.html").read_text())
    assert (
        "Convoy questions · judge: judge-0613 · references: own" in page.text
        and "valid ratings: sft 48/48; rlhf 48/48" in page.text
    )
    assert "6.00" in page.text and "0 won, 24 tied, 0 lost" in page.text and "Roleplay" in page.text
    assert read(config.parent / "metrics.jsonl")[-1]["iteration"] == 2 * (24 + 4 + 48) + 4
    assert "ratings: 96/96" in capsys.readouterr().out


@pytest.fixture
def words(tmp_path, monkeypatch):
    """What the stage leaves for the launcher."""
    monkeypatch.setenv("CONVOY_WORDS", str(tmp_path / "errors"))
    return lambda: json.loads((tmp_path / "errors/rank_0.json").read_text())


def test_the_coverage_gate_is_exit_4_and_a_refused_key_exit_1(done, folders, tmp_path, serve, capsys, words):  # noqa: F811
    server = serve(good(), rest=good("no rating"))
    config = prepare(tmp_path / "gate", folders, judge="openai", judge_url=server.url)
    assert main([reuse(done, config)]) == 4 and words()["class"] == "too few ratings"
    assert (
        "sft: no average, because 0 of 48 ratings are valid (48 unparsed)" in (config.parent / "table.md").read_text()
    )
    server = serve(*[good()] * 6, rest=(401, {}, ""))
    config = prepare(
        tmp_path / "key", folders, judge="openai", judge_url=server.url, judge_concurrency=1, judge_price_out=1.0
    )
    assert main([reuse(done, config)]) == 1 and words()["class"] == "judge"
    found = json.loads((config.parent / "results.json").read_text())
    # paid for, but no average
    assert found["judge"]["requests"] == 5 and found["judge"]["cost"] > 0 and found["scores"] is None
    assert "check the key in JUDGE_KEY" in capsys.readouterr().err
    assert "could not be used" in (config.parents[1] / "report.html").read_text()


@pytest.mark.parametrize(
    "change, code, message",
    [
        ({"judge": "gpt"}, 64, "judge = 'gpt'"),
        ({"context_length": 5}, 64, "context_length = 5"),
        ({"nonsense": 1}, 64, "nonsense"),
        ({"judge": "openai", "judge_url": "ftp://x"}, 64, "judge_url = 'ftp://x'"),
        ({"questions": "nowhere"}, 65, 'mtbench.questions = "nowhere"'),
    ],
)
def test_bad_input_is_named(folders, tmp_path, capsys, change, code, message, words):
    assert main([str(prepare(tmp_path, folders, **change))]) == code
    assert words()["class"] == {64: "bad config", 65: "bad data"}[code] and message in words()["message"]
    assert message in capsys.readouterr().err


def test_a_model_that_is_not_there_is_named(folders, tmp_path, capsys):
    assert main([str(prepare(tmp_path, folders | {"rlhf": tmp_path}))]) == 65
    assert f"paths.models.rlhf = {tmp_path}: no config.json" in capsys.readouterr().err
    assert main([]) == 64


@pytest.mark.parametrize(
    "error, kind, code",
    [
        (KeyError("categories"), "bug", 1),
        (ImportError("no BloomForCausalLM"), "bug", 1),
        (OSError(errno.ENOSPC, "No space left on device"), "disk full", 74),
        (OSError(errno.EIO, "Input/output error"), "node failure", 1),
        (PermissionError(errno.EACCES, "Permission denied"), "file error", 73),
        (ValueError("no Args in the docstring"), "bad data", 65),
    ],
)
def test_an_error_on_the_way_is_what_it_is_and_not_the_data_s(
    folders, tmp_path, monkeypatch, capsys, words, error, kind, code
):
    """Where the model is loaded, only what the folder may be at fault for is bad data."""

    def fail(*_, **__):
        raise error

    where = "eval.answers.generation.load_tokenizer"
    monkeypatch.setattr("eval.questions.load" if isinstance(error, KeyError) else where, fail)
    assert main([str(prepare(tmp_path, folders))]) == code
    assert words()["class"] == kind and str(error) in words()["message"]
    assert ("Traceback" in capsys.readouterr().err) == (code != 65)


def test_a_second_start_in_a_folder_waits_its_turn_and_an_impossible_folder_is_named(
    done, folders, tmp_path, capsys, words
):
    with exclusive(done.parent):
        assert main([str(done)]) == 75 and "another start is at work" in words()["message"]
        assert f"another start is at work in {done.parent}" in capsys.readouterr().err
    assert main([str(done)]) == 0
    config = prepare(tmp_path, folders)
    values = json.loads(config.read_text())
    values["paths"]["output"] = str(config / "below a file")
    config.write_text(json.dumps(values))
    assert main([str(config)]) == 65
    assert f"paths.output = {config}/below a file: Not a directory" in capsys.readouterr().err


def test_figures_are_the_same_bytes_again_and_curves_keep_the_last_value():
    rows = [{"iteration": i, "loss": 1.0 / i} for i in range(1, 1000)] + [
        {"iteration": 1, "loss": 7.0},
        {"iteration": 2, "loss": None},
    ]
    assert curves.panels("sft", {"run": rows}) == curves.panels("sft", {"run": rows})
    x, y = figures.curve(rows, "loss")
    assert len(x) <= figures.POINTS and x[0] == 2.5 and y[0] == pytest.approx((7 + 1 / 2 + 1 / 3 + 1 / 4) / 4)
    assert curves.panels("sft", {"run": [{"iteration": 1}]}) == ([], [])
    radar = figures.radar_svg({"a": dict.fromkeys(figures.RADAR_AXES, 5.0)})
    assert radar == figures.radar_svg({"a": dict.fromkeys(figures.RADAR_AXES, 5.0)}) and "http" not in radar
    places = [radar.index(f">{name}<") for name in ("Writing", "Roleplay", "STEM", "Humanities")]
    assert places == sorted(places)
