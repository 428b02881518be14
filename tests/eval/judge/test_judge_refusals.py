"""What a judge does not take or does not answer: one refusal is one missing rating, an outage is an
error."""

# ruff: noqa: F811

import contextlib
import json
import re
import threading

import pytest

from eval import questions
from eval.errors import JudgeError
from eval.judge import ask_all, single, transport
from eval.report import table
from eval.scores import ratings
from tests.support.judge import KEY, KNOWN, QUESTIONS, answers, client, config, good, rate
from tests.support.ratings import results

pytestmark = pytest.mark.long

CATEGORIES = {question.question_id: question.category for question in QUESTIONS.questions}


def reply(content, finish: str, **message) -> tuple:
    return (
        200,
        {},
        json.dumps({"model": "j", "choices": [{"finish_reason": finish, "message": {"content": content, **message}}]}),
    )


def refuses(status: int, message: str, **error) -> tuple:
    return status, {}, json.dumps({"error": {"message": message, **error}})


NOTHING = [
    reply(None, "content_filter", refusal="I can't help with that."),
    reply("", "stop"),
    reply("Rating: [[3]]", "content_filter"),
    (200, {}, '{"choices": []}'),
    (200, {}, '{"choices": [{"message": {}}]}'),
    refuses(400, "The response was filtered", code="content_filter"),
    refuses(413, "This model's maximum context is 8 tokens"),
]


@pytest.mark.parametrize("answer", NOTHING)
def test_one_refusal_is_one_missing_rating_which_is_named(serve, tmp_path, answer):
    text = QUESTIONS.questions[2].turns[0]
    server = serve(rest=lambda body: answer if text in str(body["messages"]) else good())
    rows, _ = rate(server, tmp_path, answers())
    assert [(row["question_id"], row["turn"], row["reason"]) for row in rows if row["score"] == -1] == [
        (QUESTIONS.questions[2].question_id, turn, "refused") for turn in (1, 2)
    ]
    found = ratings.table(rows, CATEGORIES, ["sft"], seed=0)
    number = QUESTIONS.questions[2].question_id
    assert found["models"]["sft"]["micro"]["mean"] == 7 and found["models"]["sft"]["invalid"] == {"refused": 2}
    page = table.markdown(results(found))
    assert (
        f"2 of 48 ratings are missing from the averages: question {number} turn 1 (refused), question {number} turn 2"
        in page
    )
    assert "46/48" in page and "The judge refused: http://" in page
    asked = len(server.seen)
    # paid for, and not asked again
    assert rate(server, tmp_path, answers())[0] == rows and len(server.seen) == asked


def test_a_judge_that_refuses_all_from_some_moment_on_is_an_outage(serve, tmp_path):
    server = serve(*[good()] * 6, rest=refuses(400, "Your credit balance is too low"))
    with pytest.raises(JudgeError, match="credit balance.*an item that the judge rated before is refused now, too"):
        rate(server, tmp_path, answers(), judge_concurrency=1)
    assert len((tmp_path / "model_judgment/org_judge_single.jsonl").read_text().splitlines()) == 5


def test_nothing_once_is_asked_again(serve, tmp_path):
    server = serve(good(), reply(None, "content_filter"))
    rows, _ = rate(server, tmp_path, answers())
    assert {row["score"] for row in rows} == {7}


def test_thoughts_that_used_up_the_tokens_are_cut_and_the_setting_is_named(serve, tmp_path):
    cut = reply("The list `values[1] + values[2]` needs to be", "length")
    server = serve(rest=lambda body: good() if KNOWN in str(body) else cut)
    rows, _ = rate(server, tmp_path, answers())
    found = ratings.table(rows, CATEGORIES, ["sft"], seed=0)
    assert {row["score"] for row in rows} == {-1} and found["models"]["sft"]["invalid"] == {"cut": 48}
    assert "raise it" in table.missing(results(found))[0] and "judge_max_tokens" in table.missing(results(found))[0]
    with pytest.raises(JudgeError, match="did not come to a rating .*judge_max_tokens = 2048: raise it"):
        rate(serve(rest=reply(None, "length")), tmp_path / "b", answers())


def choosy(names: str, message: str):
    """A judge that refuses requests which ``names`` matches."""
    return lambda body: refuses(400, message) if re.search(names, json.dumps(body)) else good()


@pytest.mark.parametrize(
    "names, message, adapted",
    [
        (
            '"max_tokens"',
            "Unsupported parameter: 'max_tokens' is not supported here. Use 'max_completion_tokens' instead.",
            {"temperature": 0, "max_completion_tokens": 2048},
        ),
        (
            '"temperature": 0',
            "Unsupported value: 'temperature' does not support 0. Only the default (1) value is supported.",
            {"max_tokens": 2048},
        ),
        ('"role": "system"', "System role not supported", {"temperature": 0, "max_tokens": 2048}),
        (
            '"temperature": 0|"max_tokens"|"system"',
            "System, max_tokens and temperature are not supported",
            {"max_completion_tokens": 2048},
        ),
        (
            '"role": "system"',
            "Conversation roles must alternate user/assistant/user/assistant/...",
            {"temperature": 0, "max_tokens": 2048},
        ),
    ],
)
def test_a_field_that_the_judge_does_not_take_is_left_out_and_that_is_said(
    serve, tmp_path, capsys, names, message, adapted
):
    server = serve(rest=choosy(names, message))
    rows, _ = rate(server, tmp_path, answers())
    last = server.seen[-1][2]
    assert {row["score"] for row in rows} == {7} and {
        name: last[name] for name in last if name not in ("model", "messages")
    } == adapted
    assert len(server.seen) - 49 == capsys.readouterr().out.count("does not take a part of the request; from now on: ")
    assert all(row["adapted"] for row in rows)
    if "system" in names:
        assert [turn["role"] for turn in last["messages"]] == ["user"] and "grade answers" in last["messages"][0][
            "content"
        ]


def test_a_template_that_fails_with_500_is_no_outage_and_an_error_in_a_200_is_quoted(serve, tmp_path):
    server = serve(
        rest=lambda body: (
            (500, {}, "jinja2 TemplateError: System role not supported")
            if "system" in str(body["messages"][0])
            else good()
        )
    )
    assert {row["score"] for row in rate(server, tmp_path, answers())[0]} == {7}
    server = serve(rest=(500, {}, "TemplateError: no chat template"))
    with pytest.raises(JudgeError, match="HTTP 500 .*no chat template"):
        client(server, []).complete("", "")
    assert len(server.seen) == 1
    with pytest.raises(JudgeError, match="an error instead of a completion: .*over capacity.*gave up after 7"):
        client(serve(rest=(200, {}, '{"error": {"message": "over capacity"}}')), []).complete("", "")
    with pytest.raises(JudgeError, match=r"no chat completion \(KeyError: 'choices'\)"):
        client(serve(rest=(200, {}, "{}")), []).complete("", "")


def test_a_long_or_strange_name_of_a_judge(serve, tmp_path, capsys):
    deep = "/folder" * 60
    paths = {single.judgment_path("x", name) for name in (deep, deep + "/b", "b" + deep, "org/judge")}
    assert len(paths) == 4 and all(len(path.name) < 250 for path in paths)
    rows, _ = rate(serve(), tmp_path, {"sft": answers()["sft"][:1]}, judge_model="é" * 300)
    assert len(rows) == 2
    for name in ("", "a\nb", "\x1b[2J"):
        with pytest.raises(ValueError, match="judge_model = "):
            config(serve(), tmp_path, judge_model=name)
    with pytest.raises(JudgeError) as error:
        client(serve((400, {}, "\x1b]0;owned\x07\u202e")), []).complete("", "")
    assert "owned" in str(error.value) and str(error.value).isprintable()


def test_an_address_may_have_parameters_and_the_whole_path(serve):
    server = serve()
    for address in (
        "/v1?api-version=2024",
        "/v1/chat/completions?api-version=2024",
        "/v1/chat/completions/?api-version=2024",
    ):
        server.url = server.url.partition("/v1")[0] + address
        client(server, []).complete("", "")
    assert {path for path, _, _ in server.seen} == {"/v1/chat/completions?api-version=2024"}


def test_fields_of_the_request_are_set_and_an_error_says_how(serve, tmp_path):
    server = serve()
    rate(
        server,
        tmp_path,
        answers(),
        judge_request='{"temperature": null, "max_tokens": null, "reasoning_effort": "low"}',
    )
    assert server.seen[0][2].keys() == {"model", "messages", "reasoning_effort"}
    server = serve(rest=refuses(400, "temperature: must be 0.3 here"))
    with pytest.raises(
        JudgeError, match="""HTTP 400 .*judge_request sets or leaves out .* '{"temperature": null}'.*must be 0.3"""
    ):
        rate(server, tmp_path / "b", answers())
    config(
        server, tmp_path, judge_request='{"stop_token_ids": [1], "prompt_cache_key": "a", "thinking_token_budget": 5}'
    )
    for bad in (
        "{",
        "[]",
        '{"model": "x"}',
        '{"stream": true}',
        '{"api_key": "sk-1"}',
        '{"top_p": NaN}',
        "[" * 100_000,
    ):
        with pytest.raises(ValueError, match="judge_request: ") as error:
            config(server, tmp_path, judge_request=bad)
        assert "sk-1" not in str(error.value)


def test_what_a_rating_depends_on_is_in_its_key(serve, tmp_path, monkeypatch):
    """Changed references, judge prompts, fields of the request or a local judge's content: what
    they touch is asked again."""
    server = serve()
    made = answers()
    rate(server, tmp_path, made)

    def asked_again(**values) -> int:
        before = len(server.seen)
        rate(server, tmp_path, made, **values)
        return max(0, len(server.seen) - before - 1)

    assert asked_again() == 0
    corrected = tmp_path / "corrected.jsonl"
    with_reference = [
        question
        for question in QUESTIONS.questions
        if question.reference and question.category in questions.NEEDS_REFERENCE
    ]
    corrected.write_text(
        json.dumps({"question_id": with_reference[0].question_id, "choices": [{"turns": ["42.", "7."]}]}) + "\n"
    )
    monkeypatch.setattr("tests.support.judge.QUESTIONS", questions.load("embedded", str(corrected)))
    assert asked_again() == 2 and asked_again() == 0
    assert (
        asked_again(judge_max_tokens=99) == 48
        and asked_again(judge_request='{"temperature": 1}') == 48
        and asked_again() == 0
    )
    settings = config(server, tmp_path)
    keys = {ask_all.ratings(settings, QUESTIONS, made, mark)[0].wanted[0].key("j") for mark in ("", "a", "b")}
    assert len(keys) == 3
    prompts = {name: prompt | {"system_prompt": "Be harsh."} for name, prompt in QUESTIONS.prompts.items()}
    other = single.request(
        questions.QuestionSet("", "", QUESTIONS.questions, prompts, {}), QUESTIONS.questions[0], made["sft"][0], 1
    )
    assert other.asked != single.request(QUESTIONS, QUESTIONS.questions[0], made["sft"][0], 1).asked


def test_this_machine_is_asked_without_a_proxy_and_a_proxy_is_named(serve, tmp_path, monkeypatch):
    proxy = serve(rest=(403, {}, "this address is not allowed"))
    server = serve()
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, proxy.url.replace("http://", "http://me:geheim@").removesuffix("/v1"))
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    assert client(server, []).complete("", "").text.endswith("[[7]]") and proxy.seen == []
    server.url = "http://judge.example:8000/v1"
    with pytest.raises(
        JudgeError,
        match=r"judge.example:8000/v1/chat/completions \(through the proxy http://127.0.0.1:\d+ of http_proxy; "
        "no_proxy excepts a host.*HTTP 403.*this address is not allowed",
    ) as error:
        client(server, []).complete("", "")
    assert len(proxy.seen) == 1 and "geheim" not in str(error.value) and KEY not in str(error.value)


def test_a_reply_has_limits_of_size_and_of_time(serve, monkeypatch):
    monkeypatch.setattr(transport, "LARGEST", 1000)
    waits = []
    with pytest.raises(JudgeError, match="the reply is longer than 0 MiB.*gave up after 3 attempts"):
        client(serve(rest=(200, {}, " " * 1001)), waits).complete("", "")
    server = serve()
    handler = server.server.RequestHandlerClass
    stop = threading.Event()

    def drip(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.wfile.write(
            b"HTTP/1.1 200 OK\r\nContent-Length: 900\r\n\r\n" if drips == "body" else b"HTTP/1.1 200 OK\r\nX-A: "
        )
        with contextlib.suppress(OSError):
            while not stop.wait(0.02):
                self.wfile.write(b" ")

    handler.do_POST = drip
    for drips in ("body", "headers"):  # noqa: B007 (drip reads it)
        dripping = client(server, waits)
        dripping.seconds = 0.3
        with pytest.raises(
            JudgeError, match="no whole reply within 0.3 s; mtbench.judge_seconds .*gave up after 3 attempts"
        ):
            dripping.complete("", "")
    stop.set()
