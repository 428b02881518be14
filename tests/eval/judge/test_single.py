"""The judge against a real HTTP server on loopback that misbehaves."""

import email.utils
import json
import time

import pytest

from eval.errors import JudgeError
from eval.judge import endpoint as endpoint_module
from eval.judge import single
from eval.scores import ratings
from tests.support.judge import KEY, KNOWN, QUESTIONS, answers, client, good, rate


def test_a_rating_comes_with_the_model_that_gave_it(serve):
    server = serve()
    assert client(server, []).complete("be fair", "rate this")[:2] == ("Fine. Rating: [[7]]", "judge-0613")
    path, headers, body = server.seen[0]
    assert path == "/v1/chat/completions" and headers["Authorization"] == f"Bearer {KEY}"
    assert body["model"] == "judge" and body["temperature"] == 0
    assert body["messages"] == [{"role": "system", "content": "be fair"}, {"role": "user", "content": "rate this"}]


def test_retry_after_is_obeyed_and_capped(serve):
    waits = []
    date = email.utils.formatdate(time.time() + 30, usegmt=True)
    server = serve(
        (429, {"Retry-After": "3"}, ""), (503, {"Retry-After": date}, ""), (429, {"Retry-After": "99999"}, "")
    )
    assert client(server, waits).complete("", "")[1] == "judge-0613"
    assert waits[0] == 3 and 25 < waits[1] <= 30 and waits[2] == endpoint_module.LONGEST_WAIT and len(server.seen) == 4


def test_without_retry_after_the_waits_grow(serve):
    waits = []
    server = serve((500, {}, "oops"), (502, {}, ""), (500, {}, ""), (429, {}, ""))
    client(server, waits).complete("", "")
    assert all(2**i / 2 <= wait <= 2**i for i, wait in enumerate(waits)) and len(waits) == 4


@pytest.mark.parametrize(
    "broken",
    [
        (200, {}, "{not json"),
        (200, {"Content-Length": "500"}, '{"choices": ['),
        (200, {}, "{}"),
        (200, {}, "[]"),
        (200, {}, '{"choices": []}'),
        good(text=None),
    ],
)
def test_a_broken_reply_is_asked_for_again(serve, broken):
    waits = []
    server = serve(broken)
    assert client(server, waits).complete("", "")[0].endswith("[[7]]") and len(waits) == 1


def test_silence_is_a_time_out_and_asked_again(serve):
    waits = []
    server = serve((0, {}, ""), (0, {}, ""))
    asking_it = client(server, waits)
    asking_it.seconds = 0.2
    assert asking_it.complete("", "").text.endswith("[[7]]") and len(waits) == 2 and len(server.seen) == 3


@pytest.mark.parametrize(
    "text, score",
    [
        ("[10]", 10),
        ("[[7.5]]", 7.5),
        ("[[3]], or rather [[8]]", 8),
        ("[2] of [[9]]", 9),
        ("eight of ten", -1),
        ("", -1),
        ("[[11]]", 11),
    ],
)
def test_what_the_judge_wrote_is_what_is_scored(serve, tmp_path, text, score):
    server = serve(rest=lambda body: good() if KNOWN in str(body) else good(text))
    rows, _ = rate(server, tmp_path, {"sft": answers()["sft"][:1]})
    assert [row["score"] for row in rows] == [score, score] and {row["judgment"] for row in rows} == {text}


@pytest.mark.parametrize(
    "status, hint",
    [
        (400, "HTTP 400"),
        (401, "check the key in JUDGE_KEY"),
        (403, "check the key in JUDGE_KEY"),
        (404, "check judge_url and judge_model = 'judge'"),
    ],
)
def test_fatal_at_once_with_address_and_variable_and_never_the_key(serve, status, hint):
    waits = []
    server = serve((status, {}, f"Incorrect API key provided: {KEY}"))
    with pytest.raises(JudgeError) as error:
        client(server, waits).complete("", "")
    assert server.url in str(error.value) and hint in str(error.value)
    assert KEY not in str(error.value) and waits == [] and len(server.seen) == 1


def test_a_key_that_is_not_set_is_named(serve, monkeypatch):
    monkeypatch.delenv("JUDGE_KEY")
    server = serve((401, {}, ""))
    with pytest.raises(JudgeError, match="JUDGE_KEY is not set"):
        client(server, []).complete("", "")
    assert "Authorization" not in server.seen[0][1]


def test_a_redirect_does_not_take_the_key_elsewhere(serve):
    other = serve()
    server = serve((307, {"Location": other.url + "/chat/completions"}, ""))
    with pytest.raises(JudgeError, match="HTTP 307"):
        client(server, []).complete("", "")
    assert other.seen == []


def test_gives_up_in_the_end(serve):
    waits = []
    server = serve(rest=(500, {}, f"key {KEY} seen"))
    with pytest.raises(JudgeError, match="HTTP 500.*gave up after 7 attempts") as error:
        client(server, waits).complete("", "")
    assert len(server.seen) == 7 and len(waits) == 6 and KEY not in str(error.value)
    server.server.shutdown()
    server.server.server_close()
    with pytest.raises(JudgeError, match="gave up after 7 attempts"):
        client(server, waits).complete("", "")


def test_rows_are_fastchats_and_are_not_asked_for_twice(serve, tmp_path):
    server = serve(good("[[8]]"), good("no rating here"), rest=good("Rating: [[9]]"))
    rows, _ = rate(server, tmp_path, answers(), judge_concurrency=1)
    assert len(server.seen) == 1 + 48 and len(rows) == 48
    stored = [
        json.loads(line) for line in (tmp_path / "model_judgment/org_judge_single.jsonl").read_text().splitlines()
    ]
    assert sorted(row["score"] for row in stored) == [-1] + [9] * 47
    first = next(row for row in stored if row["question_id"] == 1 and row["turn"] == 2)
    assert set(first) >= {"question_id", "model", "judge", "user_prompt", "judgment", "score", "turn", "tstamp"}
    assert first["judge"] == ["org/judge", "single-v1-multi-turn"] and first["judge_id"] == "judge-0613"
    assert "mine {1}" in first["user_prompt"] and QUESTIONS.questions[0].turns[1] in first["user_prompt"]
    again, counts = rate(server, tmp_path, answers())
    assert len(server.seen) == 49 and again == rows and counts == [48]
    changed = answers()
    changed["sft"][3] = answers("new")["sft"][3]
    rate(server, tmp_path, changed)
    assert len(server.seen) == 49 + 1 + 2  # the known item and both turns of the one new answer


def test_a_refused_key_keeps_the_ratings_so_far(serve, tmp_path):
    server = serve(good(), *[good()] * 10, rest=(401, {}, ""))
    with pytest.raises(JudgeError, match="JUDGE_KEY"):
        rate(server, tmp_path, answers(), judge_concurrency=1)
    assert len((tmp_path / "model_judgment/org_judge_single.jsonl").read_text().splitlines()) == 10
    assert len(server.seen) <= 13  # no more than what was under way
    server.rest = good()
    rows, counts = rate(server, tmp_path, answers())
    assert counts[0] == 10 and len(rows) == 48


def test_a_judge_that_gives_no_rating_is_refused_after_one_item(serve, tmp_path):
    server = serve(rest=good("I like it."))
    with pytest.raises(JudgeError, match="no rating"):
        rate(server, tmp_path, answers())
    assert len(server.seen) == 1


def test_references_are_shown_to_the_judge_where_they_are_needed():
    by_category = {question.category: question for question in QUESTIONS.questions}
    answer = {"model_id": "m", "answer_id": "a", "choices": [{"turns": ["one", "two"]}]}
    math = by_category["math"]
    request = single.request(QUESTIONS, math, answer, 2)
    assert request.prompt_name == "single-math-v1-multi-turn"
    assert all(text in request.user for text in (*math.reference, *math.turns, "one", "two"))
    first = single.request(QUESTIONS, math, answer, 1)
    assert (
        first.prompt_name == "single-math-v1"
        and math.reference[0] in first.user
        and math.reference[1] not in first.user
    )
    assert single.request(QUESTIONS, by_category["stem"], answer, 1).prompt_name == "single-v1"


def test_tokens_are_the_endpoints_or_estimated_and_the_cost_is_theirs(serve, tmp_path, capsys):
    body = json.loads(good()[2]) | {"usage": {"prompt_tokens": 900, "completion_tokens": 50}}
    server = serve(rest=(200, {}, json.dumps(body)))
    rows, _ = rate(server, tmp_path, {"sft": answers()["sft"][:2]}, judge_price_in=10.0, judge_price_out=30.0)
    assert {(row["tokens_in"], row["tokens_out"]) for row in rows} == {(900, 50)}
    before, after = capsys.readouterr().out.splitlines()
    assert (
        before.startswith(f"judge org/judge at {server.url}/chat/completions: 5 requests, about ")
        and "limits: none" in before
    )
    # 5 x (900 x 10 + 50 x 30) / 1e6
    assert after == "judge org/judge: 5 requests, 4k tokens sent and 250 written back, 0.05 USD"
    made = client(serve(), []).complete("a" * 40, "b" * 40)
    assert (made.tokens_in, made.tokens_out) == (20, len("Fine. Rating: [[7]]") // 4)


@pytest.mark.parametrize(
    "limits, message, asked",
    [
        (
            {"judge_max_requests": 48},
            "49 requests.*exceed mtbench.judge_max_requests = 48: raise it",
            0,
        ),  # the known item is one more
        ({"judge_max_cost": 0.001, "judge_price_out": 30.0}, "exceeds mtbench.judge_max_cost = 0.001: raise it", 0),
    ],
)
def test_limits_are_kept(serve, tmp_path, limits, message, asked):
    server = serve()
    with pytest.raises(JudgeError, match=message):
        rate(server, tmp_path, answers(), **limits)
    assert len(server.seen) == asked
    path = tmp_path / "model_judgment/org_judge_single.jsonl"
    assert len(path.read_text().splitlines() if path.exists() else []) == max(0, asked - 1)


def test_requests_as_planned_are_enough_and_one_asked_again_is_too_many(serve, tmp_path):
    assert len(rate(serve(), tmp_path, answers(), judge_max_requests=49)[0]) == 48
    server = serve((500, {"Retry-After": "0"}, ""))
    with pytest.raises(JudgeError, match="judge_max_requests = 49 is used up; ratings so far are kept"):
        rate(server, tmp_path / "b", answers(), judge_max_requests=49)
    assert len(server.seen) == 49


@pytest.mark.parametrize("concurrency", [1, 8])
def test_a_cost_limit_stops_what_the_estimate_let_through(serve, tmp_path, concurrency):
    """Judgments of 100,000 tokens at 1 a million: the tenth reaches 1, also where many are under
    way at once."""
    body = json.loads(good()[2]) | {"usage": {"prompt_tokens": 1, "completion_tokens": 100_000}}
    server = serve(rest=(200, {}, json.dumps(body)))
    with pytest.raises(JudgeError, match="judge_max_cost = 1 USD is used up"):
        rate(server, tmp_path, answers(), judge_max_cost=1.0, judge_price_out=1.0, judge_concurrency=concurrency)
    assert len(server.seen) == 10


def test_the_key_may_come_from_a_file_of_its_owner_alone(serve, tmp_path, monkeypatch):
    monkeypatch.delenv("JUDGE_KEY")
    file = tmp_path / "key"
    file.write_text(KEY + "\n")
    file.chmod(0o644)
    server = serve(rest=(401, {}, ""))
    with pytest.raises(JudgeError, match="chmod 600"):
        client(server, [], judge_key_file=str(file))
    file.chmod(0o600)
    with pytest.raises(JudgeError, match=f"HTTP 401.*check the key in {file}") as error:
        client(server, [], judge_key_file=str(file)).complete("", "")
    assert server.seen[0][1]["Authorization"] == f"Bearer {KEY}" and KEY not in str(error.value)
    with pytest.raises(JudgeError, match="No such file"):
        client(server, [], judge_key_file=str(tmp_path / "none"))


def test_repeats_are_rows_of_their_own_and_show_the_judges_spread(serve, tmp_path):
    """The judge says 4, then 6, of everything: a rating's deviation from its answer's mean is
    sqrt(2), and the averages are 4 and 6."""
    asked = []

    def moody(body: dict) -> tuple:
        text = body["messages"][1]["content"]
        asked.append(text)
        return good(f"[[{4 if asked.count(text) == 1 else 6}]]")

    server = serve(good(), rest=moody)
    rows, _ = rate(server, tmp_path, answers(), judge_repeats=2, judge_concurrency=1)
    assert len(rows) == 96 and len(server.seen) == 97
    categories = {question.question_id: question.category for question in QUESTIONS.questions}
    found = ratings.table(rows, categories, ["sft"], seed=0, repeats=2)["models"]["sft"]
    assert found["n_valid"] == found["n_expected"] == 96 and found["micro"]["mean"] == 5
    assert found["spread"] == {"rating_sd": pytest.approx(2**0.5), "averages": [4, 6]}
    once = ratings.table(rows[:48], categories, ["sft"], seed=0)["models"]["sft"]
    assert once["micro"]["mean"] == 4 and once["spread"] is None


def test_the_file_is_left_with_one_row_a_place(serve, tmp_path):
    """FastChat averages every line: ratings of an answer that was made again, and repeated lines,
    are moved aside; other models' stay."""
    server = serve()
    rate(server, tmp_path, answers())
    path = tmp_path / "model_judgment/org_judge_single.jsonl"
    lines = path.read_text().splitlines()
    other = json.loads(lines[0]) | {"model": "someone else's"}
    path.write_text("\n".join([*lines, lines[5], json.dumps(other)]) + "\n")
    changed = answers()
    changed["sft"][3] = answers("new")["sft"][3]
    rate(server, tmp_path, changed)
    left = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(left) == 49 and sum(row["model"] == "someone else's" for row in left) == 1
    assert len({single.row_place(row) for row in left}) == 49
    assert len((path.parent / "superseded" / path.name).read_text().splitlines()) == 3


@pytest.mark.parametrize("bad", ["sk-very\r\nsecret", "sk-véry-secret", "sk-\u2028very", "sk very"])
def test_a_key_that_no_header_can_hold_is_refused_unquoted(serve, tmp_path, monkeypatch, bad):
    server, file = serve(), tmp_path / "key"
    file.write_text(bad, encoding="utf-8")
    file.chmod(0o600)
    for place, values in (("JUDGE_KEY", {}), (str(file), {"judge_key_file": str(file)})):
        monkeypatch.setenv("JUDGE_KEY", bad)
        with pytest.raises(JudgeError, match="visible ASCII") as error:
            client(server, [], **values)
        assert place in str(error.value) and "very" not in str(error.value) and "véry" not in str(error.value)
    file.write_bytes(b"\xff\xfe")
    for name in (str(file), "~no-such-user-here/key"):
        with pytest.raises(JudgeError, match="judge_key_file"):
            client(server, [], judge_key_file=name)
    assert server.seen == []


def test_what_the_endpoint_says_never_holds_the_key(serve, tmp_path, monkeypatch):
    """In the reason, across the place where a long body is cut, with escapes, in the judgment and
    in the model's name."""
    key = 'sk-"very/secret'
    monkeypatch.setenv("JUDGE_KEY", key + "\n")  # as $(cat file) in some shells leaves it
    escaped = [
        json.dumps(key)[1:-1],
        json.dumps(key)[1:-1].replace("/", "\\/"),
        "".join(f"\\u{ord(c):04X}" for c in key),
    ]
    for body in [*escaped, "x" * 290 + key, " " * 65530 + key]:
        server = serve(rest=(400, {}, body))
        with pytest.raises(JudgeError) as error:
            client(server, []).complete("", "")
        assert "sk-" not in str(error.value) and "\\u0073" not in str(error.value)
    server.server.RequestHandlerClass.responses = {400: (key, "")}
    with pytest.raises(JudgeError, match=r"HTTP 400 \*\*\*") as error:
        client(server, []).complete("", "")
    assert "sk-" not in str(error.value)
    rows, _ = rate(
        serve(good(), rest=good(f"You sent {key}. [[5]]", model=key)), tmp_path, {"sft": answers()["sft"][:1]}
    )
    assert [row["score"] for row in rows] == [5, 5] and {row["judge_id"] for row in rows} == {"***"}
    assert not any("secret" in path.read_text() for path in tmp_path.rglob("*.jsonl"))
    with pytest.raises(JudgeError, match="no rating") as error:
        rate(serve(rest=good(f"{key} is yours")), tmp_path / "b", answers())
    assert "secret" not in str(error.value)


@pytest.mark.parametrize(
    "text, kept", [("\ud800 [[7]]", "\ufffd [[7]]"), ("[[" + "9" * 5000 + "]]", ""), ("[[" + "9" * 400 + ".0]]", "")]
)
def test_a_strange_judgment_is_a_row_all_the_same(serve, tmp_path, text, kept):
    rows, _ = rate(serve(good(), rest=good(text)), tmp_path, {"sft": answers()["sft"][:1]})
    assert [row["score"] for row in rows] == [7 if kept else -1] * 2 and rows[0]["judgment"] == (kept or text)
    again, _ = rate(serve(rest=(401, {}, "")), tmp_path, {"sft": answers()["sft"][:1]})
    assert again == rows


@pytest.mark.parametrize(
    "usage", [[1], "many", {"prompt_tokens": -5, "completion_tokens": "9"}, {"prompt_tokens": 10**400}]
)
def test_strange_token_counts_are_estimated_and_deep_nesting_is_a_broken_reply(serve, usage):
    body = json.dumps(json.loads(good()[2]) | {"usage": usage})
    waits = []
    made = client(serve((200, {}, "[" * 100_000), rest=(200, {}, body)), waits).complete("a" * 40, "b" * 40)
    assert (made.tokens_in, made.tokens_out) == (20, len("Fine. Rating: [[7]]") // 4) and len(waits) == 1


def test_the_file_holds_what_this_start_asked_for_and_what_was_paid_is_not_paid_again(serve, tmp_path):
    """Fewer repeats and questions leave no other rows for FastChat to average; asked for again,
    they are taken back."""
    server = serve()
    path = tmp_path / "model_judgment/org_judge_single.jsonl"
    for repeats, questions_asked in ((2, 2), (1, 2), (2, 1), (2, 2)):
        made = {"sft": answers()["sft"][:questions_asked]}
        rows, counts = rate(server, tmp_path, made, judge_repeats=repeats)
        left = [json.loads(line) for line in path.read_text().splitlines()]
        assert len(left) == len(rows) == 2 * repeats * questions_asked and all(row in left for row in rows)
    assert len(server.seen) == 1 + 8 and counts == [8]
    aside = (path.parent / "superseded" / path.name).read_text().splitlines()
    assert len(aside) == len(set(aside)) == 6
