"""The report of whole, half and strange runs; what it says of several; and the page itself in a
real browser."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from eval.errors import DataError
from eval.files.jsonl import dump, write
from eval.judge import pairwise, single
from eval.report import answer_browser, curves, reward_accuracy, run_facts, run_folder
from eval.report import page as report
from tests.support.evaluations import IDS, QUESTIONS, evaluate, make_run

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def text_of(found: dict) -> str:
    page = report.page(found)
    assert page == report.page(found), "the same input must give the same bytes"
    return html.unescape(re.sub(r"<(script|style)>.*?</\1>|<[^>]*>", " ", page, flags=re.DOTALL))


def test_stages_and_their_numbers_are_what_the_folder_says(tmp_path):
    run = run_folder.collect(make_run(tmp_path / "one"))
    assert [stage.name for stage in run.stages] == ["warm-up", "dpo", "mtbench"] and len(run.stages[1].metrics) == 3
    main, more = curves.panels("dpo", {"one": run.stages[1].metrics})
    titles, others = ({one["title"] for one in panels} for panels in (main, more))
    assert {"Loss, nats", "KL to the reference, nats a response", "Seconds of a phase", "Tokens a second"} <= titles
    assert "odd number" in others and not any("low" in title or " at " in title for title in others)
    text = text_of({"one": run})
    for expected in (
        "warm-up, by iteration",
        "temperature of the room",
        "dpo, by iteration",
        "MT-Bench, sft → dpo",
        "3.00 → 5.00",
        "commit abc123",
        "manifest feedfeedfeed",
        "1 min 30 s",
        "arc_tiny",
        "0.2500",
        "36 judgments",
        "0.25 EUR",
        "dpo says <b>1</b>",
        "cut at the limit",
        "Reward against distance",
        "dpo.beta",
    ):
        assert expected in text, expected


def test_a_run_that_has_just_begun_and_a_folder_that_is_none(tmp_path):
    write(tmp_path / "new/config.json", json.dumps({"run": {"id": "new-1"}}))
    assert "Provenance" in text_of(report.collect([tmp_path / "new"]))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="neither a run .* nor an evaluation"):
        report.collect([tmp_path / "empty"])
    assert report.main([str(tmp_path / "empty")]) == 65
    strange = tmp_path / "strange/mtbench/results.json"
    write(strange, '{"scores": 5}')
    write(strange.parents[1] / "config.json", "{torn")
    write(strange.with_name("status.json"), '{"state": "failed"}')
    assert "failed" in text_of(report.collect([strange.parents[1]]))


def test_time_and_memory_by_hand(tmp_path):
    """warm-up 5 s; dpo 30 + 60 s on 2 x 4 ranks = 0.2 rank hours, seconds 2 and (1 + 2 + 3) / 3 an
    iteration, tokens' median 200."""
    rows = {row["name"]: row for row in run_facts.stage_rows(run_folder.collect(make_run(tmp_path / "one")))}
    assert rows["warm-up"]["seconds"] == 5 and rows["mtbench"]["seconds"] is None and rows["warm-up"]["ranks"] is None
    dpo = rows["dpo"]
    assert (dpo["seconds"], dpo["attempts"], dpo["ranks"], dpo["rank_hours"]) == (90, 2, 8, 0.2)
    assert dpo["phases"] == {
        "forward": {"seconds": 2.0, "tokens_per_second": None, "memory_gb": None},
        "update": {"seconds": 2.0, "tokens_per_second": 18.0, "memory_gb": 6.0},
    }
    assert dpo["memory_gb"] == 6.0 and dpo["tokens_per_second"] == 200


def test_accuracy_is_held_against_every_floor():
    row = {
        "iteration": 5,
        "heldout_accuracy": 0.8,
        "heldout_accuracy_low": 0.74,
        "heldout_accuracy_high": 0.85,
        "shorter_wins": 0.7,
    }
    assert reward_accuracy.of_rows([row])["above"] and reward_accuracy.of_rows([row])["floors"] == {
        "chance": 0.5,
        "shorter wins": 0.7,
    }
    assert not reward_accuracy.of_rows([row | {"longer_wins": 0.75}])["above"]
    assert reward_accuracy.of_rows([{"iteration": 1, "loss": 2.0}]) is None


def test_runs_judged_alike_stand_in_one_table(tmp_path, capsys):
    one, two = make_run(tmp_path / "one"), make_run(tmp_path / "two", lr=5e-4, plus=4)
    assert report.main([str(one), str(two)]) == 0
    folder = Path(capsys.readouterr().out.strip()).parent
    assert folder.name == "report-one-two"
    written = json.loads((folder / "results.json").read_text())
    table = written["scores"]
    assert (
        set(written["heldout"]["gold"])
        == set(written["checks"]["questions"])
        == set(written["harness"])
        == set(table["models"])
    )
    assert {name: row["micro"]["mean"] for name, row in table["models"].items()} == {
        "one/sft": 3,
        "one/dpo": 5,
        "two/sft": 3,
        "two/dpo": 7,
    }
    assert table["differences"]["two/dpo"]["micro"]["mean"] == 4 and table["baseline"] == "one/sft"
    assert "two/dpo − one/sft,+4.00" in (folder / "table.csv").read_text()
    found = report.collect([one, two])
    assert run_facts.differences(list(found.values())) == [("dpo.lr", ["0.001", "0.0005"])]
    lacking = run_folder.Run(
        "three", tmp_path, {name: value for name, value in found["one"].config.items() if name != "dpo"}
    )
    assert run_facts.differences([found["one"], lacking]) == [("dpo", ["2 keys", "-"])]
    text = text_of(found)
    assert "what differs" in text and "0.0005" in text and "0.50 EUR" in text and "two, held out" in text
    assert len(report.collect([one, one, tmp_path / "one/../one"])) == 1


def test_a_stage_taken_from_another_run_is_shown_once(tmp_path):
    """With --reuse a run has another one's stage, its metrics among it; nothing of it is counted a
    second time."""
    one, two = make_run(tmp_path / "one"), make_run(tmp_path / "two", lr=5e-4)
    shutil.rmtree(two / "warm-up")
    shutil.copytree(one / "warm-up", two / "warm-up")
    found = report.collect([one, two])
    assert [stage.name for stage in found["two"].stages] == ["warm-up", "dpo", "mtbench"]
    own = report.measured(found)
    assert own["one"] == found["one"] and [stage.name for stage in own["two"].stages] == ["dpo", "mtbench"]
    text = text_of(found)
    assert "one, dpo" in text and "two, dpo" in text
    (two / "dpo/metrics.jsonl").write_bytes((one / "dpo/metrics.jsonl").read_bytes())
    text = text_of(report.collect([one, two]))
    assert "one, dpo" in text and "two, dpo" not in text


def test_runs_judged_differently_do_not(tmp_path):
    found = report.collect([make_run(tmp_path / "a/x"), make_run(tmp_path / "b/x", judged_by="another")])
    assert list(found) == ["a/x", "b/x"]
    made, different = report.blocks(report.evaluations(found))
    assert [block["name"] for block in made] == ["a/x", "b/x"] and different == [
        "judge returned differs: a/x: ['j']; b/x: ['another']"
    ]
    assert "These runs were judged differently" in text_of(found)


def test_the_browser_shows_ratings_verdicts_and_how_far_models_are_apart(tmp_path):
    evaluate(tmp_path)
    found = answer_browser.questions(report.evaluations(report.collect([tmp_path])))
    assert [entry["id"] for entry in found] == IDS and found[0]["apart"] == 2
    turn = found[0]["turns"][0]
    assert (
        turn["reference"] == "so"
        and [row["score"] for row in turn["answers"]["dpo"]["ratings"]] == [5]
        and len(turn["verdicts"]) == 1
    )
    stale = single.judgment_path(str(tmp_path), "j")
    dump(stale, [row | {"answer_id": "of another answer"} for row in run_folder.lines(stale)])
    assert answer_browser.questions(report.evaluations(report.collect([tmp_path])))[0]["apart"] is None
    assert pairwise.row_place(run_folder.lines(single.judgment_path(str(tmp_path), "j", "pair"))[0])[1:3] == (
        "dpo",
        "sft",
    )


PARENT = """<body><iframe src="page.html" style="width:390px;height:800px"></iframe>
<iframe src="page.html" style="width:1280px;height:800px"></iframe><pre id="out"></pre><script>
addEventListener("message", event => { document.getElementById("out").textContent += JSON.stringify(event.data) + "\\n"; });
</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here (apt-get install chromium)")
@pytest.mark.parametrize("dark", [False, True])
def test_in_a_browser_nothing_leaves_the_page_and_nobody_stumbles(tmp_path, dark):
    """On a phone's and a desk's width: no console message, no request, and page_checks.js finds
    nothing."""
    page = report.page(report.collect([make_run(tmp_path / "one"), make_run(tmp_path / "two", plus=3)]))
    script = (Path(__file__).parent / "page_checks.js").read_text()
    write(tmp_path / "page.html", page.replace("</body>", f"<script>{{\n{script}\n}}</script></body>"))
    write(tmp_path / "parent.html", PARENT)
    done = subprocess.run(
        [
            CHROMIUM,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--no-first-run",
            "--dump-dom",
            f"--user-data-dir={tmp_path / 'profile'}",
            "--enable-logging=stderr",
            "--virtual-time-budget=20000",
            "--window-size=1700,900",
            f"--log-net-log={tmp_path / 'net.json'}",
            f"--blink-settings=preferredColorScheme={0 if dark else 1}",
            (tmp_path / "parent.html").as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert console == []
    said = [
        json.loads(line)
        for line in html.unescape(done.stdout.split('<pre id="out">')[1].split("</pre>")[0]).splitlines()
    ]
    assert [(one["found"], one["dark"]) for one in said] == [([], dark)] * 2 and {one["width"] for one in said} == {
        390,
        1280,
    }
    net = (tmp_path / "net.json").read_text().splitlines()
    # the browser's own requests: its updates, the time
    assert any('"initiator":' in line for line in net)
    assert not [
        line for line in net if '"initiator":' in line and "file://" in line and re.search('"url":"(http|ws)', line)
    ]


def test_a_row_may_hold_any_line_separator_of_unicode(tmp_path):
    rows = [{"text": f"one{separator}two"} for separator in "\u2028\u2029\u0085\v\f\r\n"]
    dump(tmp_path / "rows.jsonl", rows)
    assert run_folder.lines(tmp_path / "rows.jsonl") == rows


def test_results_of_an_older_version_are_named(tmp_path, capsys):
    evaluate(tmp_path)
    results = run_folder.read_json(tmp_path / "results.json")
    for old, absent in (
        ({k: v for k, v in results.items() if k != "pairwise"}, "no pairwise: "),
        (results | {"judge": {"requested": "j"}}, "no judge.cost, judge.currency"),
    ):
        write(tmp_path / "results.json", json.dumps(old))
        assert report.main([str(tmp_path)]) == 65
        said = capsys.readouterr().err
        assert absent in said and "made by an older version; run mtbench again" in said


@pytest.mark.parametrize("text", ["", '{"questions": ', "[1]", None])
def test_damaged_results_are_named(tmp_path, capsys, text):
    evaluate(tmp_path)
    results = run_folder.read_json(tmp_path / "results.json") | {"heldout": None}
    write(tmp_path / "results.json", json.dumps(results) if text is None else text)
    assert report.main([str(tmp_path)]) == 65
    assert "results.json" in (said := capsys.readouterr().err) and "damaged: make the evaluation again" in said


def test_scores_by_different_reward_models_are_marked(tmp_path):
    folders = []
    for name, scorer in (("one", "feed" * 4), ("two", "feed" * 4), ("three", "c0de" * 4)):
        evaluate(tmp_path / name)
        results = run_folder.read_json(tmp_path / name / "results.json")
        value = {"mean": 0.5, "low": 0.25, "high": 0.75, "units": 3}
        results["heldout"] |= {"score": {"sft": value, "dpo": value}, "scored_by": {"sft": scorer, "dpo": scorer}}
        write(tmp_path / name / "results.json", json.dumps(results))
        folders.append(tmp_path / name)
    assert "Not the same reward model" not in text_of(report.collect(folders[:2]))
    text = text_of(report.collect(folders))
    assert "Not the same reward model" in text and "feedfeed" in text and "c0dec0de" in text


def test_rows_of_other_tools_are_left_out(tmp_path):
    evaluate(tmp_path)
    before = report.page(report.collect([tmp_path]))
    for path in (
        "question.jsonl",
        "model_answer/sft.jsonl",
        "heldout/sft.jsonl",
        *(f"model_judgment/j_{kind}.jsonl" for kind in ("single", "pair")),
    ):
        rows = run_folder.lines(tmp_path / path)
        dump(
            tmp_path / path,
            [{"question_id": 1, "answer_id": "sft1", "index": 0, "sample": 0, "turn": 1, "model": "sft"}, *rows, {}],
        )
    assert report.page(report.collect([tmp_path])) == before


@pytest.mark.parametrize("kept", [0, 4])
def test_runs_whose_questions_are_gone_do_not_share_a_table(tmp_path, kept):
    one, two = make_run(tmp_path / "one"), make_run(tmp_path / "two")
    place = next(tmp_path.glob("one/*/question.jsonl"))
    dump(place, QUESTIONS[:kept])
    made, different = report.blocks(report.evaluations(report.collect([one, two])))
    assert len(made) == 2 and different == [f"one: {place} has {kept} questions, 6 were rated"]


def test_answers_in_any_script_and_with_nul_are_shown(tmp_path):
    evaluate(tmp_path)
    path = tmp_path / "model_answer/sft.jsonl"
    rows = run_folder.lines(path)
    rows[0]["choices"][0]["turns"][0] = "\u05e9\u05dc\u05d5\u05dd\0"
    dump(path, rows)
    assert report.main([str(tmp_path)]) == 0
    source = (tmp_path / "report.html").read_text()
    assert '<p class="text" dir="auto">\u05e9\u05dc\u05d5\u05dd\ufffd</p>' in source and "\0" not in source
