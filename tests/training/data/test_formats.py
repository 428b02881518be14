"""Each format reads into the same rows; what can't be read is named by file, line and field; what
must not be used is counted."""

from __future__ import annotations

import gzip
import json
import re
from collections import Counter

import pytest

from training.data import dialogue, peek
from training.data.cache import cached
from training.data.formats import DataError, iterate
from training.data.rows import JUDGED, Row, parse
from training.data.tokenizer import Tokenizer
from training.data.turns import BadRow, Unusable


def load_rows(file, stage: str) -> list[dict]:
    return [row.as_native(stage) for row in iterate(file, stage, Counter())]


Q, CUE = "\n\nHuman: Why?", "\n\nAssistant:"
PAIR = Row(Q + CUE, (" So.", " No."), (1.0, 0.0))
USER, SO, NO, MORE = (
    {"role": role, "content": text}
    for role, text in (("user", "Why?"), ("assistant", "So."), ("assistant", "No."), ("user", "And?"))
)


@pytest.mark.parametrize(
    "row",
    [
        {"chosen": f"{Q}{CUE} So.", "rejected": f"{Q}{CUE} No."},
        {"prompt": "Why?", "chosen": "So.", "rejected": "No."},
        {"prompt": Q, "chosen": " So.", "rejected": "No. "},
        {"prompt": Q + CUE + " ", "chosen": "So.", "rejected": "No."},
        {"prompt": [USER], "chosen": [SO], "rejected": [NO]},
        {"chosen": [USER, SO], "rejected": [USER, NO]},
        {"prompt": "Why?", "chosen": [USER, SO], "rejected": [USER, NO]},
        {"query": Q + CUE, "response": [" So.", " No."], "score": [1, 0]},
    ],
)
def test_preferences_of_every_format_are_the_same_row(row):
    assert parse(row) == PAIR


@pytest.mark.parametrize(
    ("row", "expected"),
    [  # TRL's dataset formats: text and messages of each type
        ({"prompt": "Why?", "completion": "So."}, Row(Q + CUE, (" So.",), (0.0,))),
        ({"prompt": [USER], "completion": [SO]}, Row(Q + CUE, (" So.",), (0.0,))),
        ({"prompt": [USER], "completion": [SO, MORE, NO]}, Row(f"{Q}{CUE} So.\n\nHuman: And?{CUE}", (" No.",), (0.0,))),
        ({"prompt": "Why?", "completion": "So.", "label": True}, Row(Q + CUE, (" So.",), (0.0,))),
        ({"prompt": [USER]}, Row(Q + CUE)),
        ({"prompt": [USER, SO, MORE]}, Row(f"{Q}{CUE} So.\n\nHuman: And?{CUE}")),
        (
            {"prompt": [USER], "chosen": [SO, MORE, SO], "rejected": [SO, MORE, NO]},
            Row(f"{Q}{CUE} So.\n\nHuman: And?{CUE}", (" So.", " No."), (1.0, 0.0)),
        ),
        ({"prompt": [USER], "chosen": [USER, SO], "rejected": [USER, NO]}, PAIR),
        (
            {"prompt": "Why?", "chosen": [SO, MORE, SO], "rejected": [SO, MORE, NO]},
            Row(f"{Q}{CUE} So.\n\nHuman: And?{CUE}", (" So.", " No."), (1.0, 0.0)),
        ),
    ],
)
def test_completions_and_prompts_as_trl_has_them(row, expected):
    assert parse(row) == expected


def test_a_completion_that_is_called_bad_teaches_nothing():
    """Whatever the field is called; OpenAI's format says it with a weight."""
    for row in (
        {"prompt": "Why?", "completion": "No."},
        {"prompt": "Why?", "completion": [SO]},
        {"query": "Why?", "response": "No."},
        {"messages": [USER, SO]},
    ):
        assert parse(row | {"label": True}).responses
        with pytest.raises(Unusable, match="reply with label false"):
            parse(row | {"label": False})
    assert parse({"messages": [USER, {**SO, "weight": 1}]}).responses
    with pytest.raises(Unusable, match="reply with weight 0"):
        parse({"messages": [USER, {**SO, "weight": 0}]})


@pytest.mark.parametrize("names", JUDGED)
def test_a_pair_whose_scores_say_the_opposite_is_dropped(names):
    row = {"prompt": "Why?", "chosen": "So.", "rejected": "No."}
    assert parse(row | dict(zip(names, (7, 3.5), strict=True))) == parse(row) == parse(row | dict.fromkeys(names))
    with pytest.raises(Unusable, match="the rejected reply has the higher score"):
        parse(row | dict(zip(names, (3.5, 7), strict=True)))


@pytest.mark.parametrize(
    "line, message",
    [
        ('{"prompt": "p", "response": "good", "response": "bad"}', "'response': stands twice"),
        ('{"messages": [{"role": "user", "content": "a", "content": "b"}]}', "'content': stands twice"),
        ('{"prompt": "p", "query": "q", "response": "r"}', "query: 'q': another text than prompt's 'p'"),
        (
            '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "", "tool_calls": '
            '[{"function": {"name": "f"}}]}]}',
            r"messages[1].tool_calls: ",
        ),
        (
            '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "function_call": '
            '{"name": "f"}}]}',
            r"messages[1].function_call: ",
        ),
    ],
)
def test_a_row_that_says_two_things_is_an_error(tmp_path, line, message):
    file = tmp_path / "rows.jsonl"
    file.write_text(line + "\n")
    with pytest.raises(DataError, match=f"rows.jsonl:1: {re.escape(message)}"):
        list(iterate(file, "rlhf", Counter()))


def test_a_field_that_nothing_reads_is_counted_by_its_name(tmp_path, capsys):
    """A prompt may stand beside its source; the replies may stand there under a name of their own,
    too."""
    rows = [
        {"prompt": "p", "answer": "a", "id": 5, "tags": []},
        {"prompt": "q", "answer": "b", "source": "web"},
        {"messages": [USER, SO], "prompt": "Why?"},
        {"prompt": "Why?", "chosen": "a", "rejected": "b", "messages": [USER, SO]},
        *({"prompt": "p", f"name{number}": "x"} for number in range(80)),
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    counts = Counter()
    assert len(list(iterate(file, "rlhf", counts))) == len(rows)
    found = {
        name.removeprefix("not read: "): number for name, number in counts.items() if name.startswith("not read: ")
    }
    assert list(found.items())[:4] == [
        ("field 'answer'", 2),
        ("field 'source'", 1),
        ("field 'prompt'", 1),
        ("field 'messages'", 1),
    ]
    assert found["other fields"] > 30 and len(found) < 60
    assert peek.main([str(file), "2"]) == 0
    assert "none can be compared, nothing reads field 'answer', field 'source'" in capsys.readouterr().out


def test_a_prompt_beside_whole_conversations_loses_none_of_their_turns():
    longer = [USER, SO, {"role": "user", "content": "And?"}]
    assert (
        parse({"prompt": "Why?", "chosen": [*longer, SO], "rejected": [*longer, NO]}).prompt
        == f"{Q}{CUE} So.\n\nHuman: And?{CUE}"
    )
    with pytest.raises(Unusable, match="prompts of chosen and rejected differ"):
        parse({"prompt": "Why?", "chosen": [*longer, SO], "rejected": [USER, NO]})


SYSTEM, LATE = ({"role": "system", "content": text} for text in ("Be kind.", "In one word."))
REFUSED = [
    ({"messages": [USER, LATE, SO]}, r"messages\[1\].role: 'system': expected only as the first message"),
    ({"messages": [USER, LATE, SO, MORE, NO]}, r"messages\[1\].role: 'system'"),
    ({"messages": [SYSTEM, LATE, USER, SO]}, r"messages\[1\].role: 'system'"),
    ({"messages": [USER, SO, LATE]}, r"messages\[2\].role: 'system': expected the last message to be the assistant's"),
    ({"messages": [SYSTEM, SO]}, r"messages\[1\].role: 'assistant': expected a user's message before it"),
    ({"messages": [SO]}, r"messages\[0\].role: 'assistant': expected a user's message before it"),
    ({"messages": [USER, MORE, SO]}, r"messages\[1\].role: 'user' follows another 'user'"),
    ({"messages": [USER, {"role": "human", "content": "And?"}, SO]}, r"messages\[1\].role: 'user' follows"),
    ({"messages": [USER, SO, NO]}, r"messages\[2\].role: 'assistant' follows another 'assistant'"),
    (
        {"messages": [USER, {"role": ["user"], "content": "x"}, SO]},
        r"messages\[1\].role: \['user'\]: expected system, user",
    ),
    (
        {"prompt": [USER, LATE], "completion": "So."},
        r"prompt\[1\].role: 'system': expected the last message to be the user's",
    ),
    ({"prompt": [USER], "completion": [MORE, SO]}, r"prompt and the turns before the reply\[1\].role: 'user' follows"),
    ({"prompt": [USER], "completion": [LATE, SO]}, r"completion\[1\].role: 'assistant': expected a user's"),
    ({"prompt": [USER], "chosen": [SO, SO], "rejected": [SO, NO]}, r"chosen\[1\].role: 'assistant' follows"),
    (
        {"prompt": "Why?", "chosen": [SYSTEM, SO], "rejected": [SYSTEM, NO]},
        r"chosen\[1\].role: 'assistant': expected a user's",
    ),
    (
        {"prompt": "Why?", "chosen": [LATE, MORE, SO], "rejected": [LATE, MORE, NO]},
        r"prompt: 'Why\?': none of the messages",
    ),
    ({"prompt": "Why?", "completion": [SO, MORE, LATE, NO]}, r"completion\[2\].role: 'system'"),
]


@pytest.mark.parametrize(("row", "message"), REFUSED)
def test_turns_in_another_order_are_named_and_never_joined(row, message):
    with pytest.raises(BadRow, match=message):
        parse(row)


def test_empty_turns():
    """They make a row unusable; an empty system message says nothing."""
    empty = {"role": "user", "content": " \n"}
    for row in (
        {"messages": [empty, SO]},
        {"messages": [USER, SO, empty, SO]},
        {"messages": [USER, {**SO, "content": ""}, MORE, SO]},
        {"prompt": [USER], "completion": [{**SO, "content": ""}, MORE, NO]},
    ):
        with pytest.raises(Unusable, match="empty turn"):
            parse(row)
    for row in ({"prompt": "", "completion": "So."}, {"prompt": " ", "chosen": "So.", "rejected": "No."}):
        with pytest.raises(Unusable, match="empty prompt"):
            parse(row)
    assert parse({"messages": [{"role": "system", "content": ""}, USER, SO]}).prompt == Q + CUE
    assert parse({"messages": [SYSTEM, USER, SO]}).prompt == f"\n\nHuman: Be kind.\nWhy?{CUE}"


@pytest.mark.parametrize("prompt", ["Why?", Q + CUE])
def test_replies_that_are_the_whole_dialogue_lose_its_prompt(prompt):
    pair = {"prompt": prompt, "chosen": f"{Q}{CUE} So.", "rejected": f"{Q}{CUE} No."}
    assert parse(pair)[:3] == PAIR[:3] and parse(pair).notes == ("prompt cut from the replies that began with it",)
    assert parse({"prompt": prompt, "completion": f"{Q}{CUE} So."}).responses == (" So.",)
    native = {"query": Q + CUE, "response": [f"{Q}{CUE} So.", " No."], "score": [1, 0]}
    assert parse(native)[:3] == PAIR[:3]


LONG = "Which river does otter %d live in?"


@pytest.mark.parametrize(
    "row",
    [
        lambda ask, say: {"prompt": ask, "chosen": f"{ask} {say}", "rejected": "No."},
        lambda ask, say: {"prompt": ask, "response": f"{ask}\n{say}"},
        lambda ask, say: {"query": ask, "response": ["No.", f" {ask} {say}"], "score": [0, 1]},
        lambda ask, say: {"messages": [USER, SO, {**USER, "content": ask}, {**SO, "content": f"{ask} {say}"}]},
    ],
)
def test_a_file_whose_replies_begin_with_their_prompts_is_refused(tmp_path, capsys, row):
    file = tmp_path / "rows.jsonl"
    lines = [json.dumps(row(LONG % number, "In the lake.")) + "\n" for number in range(30)]
    file.write_text("".join(lines))
    assert peek.main([str(file), "100"]) == 65
    assert (
        "in 30 of 30 rows a reply begins with its own prompt (e.g. 'Which river does otter 0" in capsys.readouterr().err
    )
    file.write_text(
        "".join(
            lines[:2]
            + [
                json.dumps(row(LONG % number, "x"))
                .replace(f"{LONG % number} x", "x")
                .replace(f"{LONG % number}\\nx", "x")
                + "\n"
                for number in range(2, 40)
            ]
        )
    )
    assert peek.main([str(file), "100"]) == 0  # answers that repeat the question


def test_short_prompts_inside_their_replies_are_seen_where_most_rows_have_them(tmp_path, capsys):
    file = tmp_path / "rows.jsonl"
    file.write_text(
        "".join(json.dumps({"prompt": f"{n} + {n} =", "response": f"{n} + {n} = {2 * n}"}) + "\n" for n in range(9))
    )
    assert peek.main([str(file), "100"]) == 65 and "in 9 of 9 rows" in capsys.readouterr().err


def test_places_of_bad_messages_are_counted_together(tmp_path):
    file, counts = tmp_path / "rows.jsonl", Counter()
    file.write_text(
        "".join(json.dumps({"messages": [USER, SO] * number + [LATE, SO]}) + "\n" for number in range(1, 30))
    )
    assert not list(iterate(file, "sft", counts, True))
    assert counts == {"rows": 29, "dropped: bad row, messages[].role": 29}


def test_the_prompt_reaches_to_the_last_cue():
    text = f"\n\nHuman: A{CUE} B\n\nHuman: C{CUE}"
    assert parse({"chosen": text + " D", "rejected": text + "  E"}) == Row(text, (" D", " E"), (1.0, 0.0))


def test_chat_messages_keep_system_and_earlier_turns():
    messages = [{"role": "system", "content": "Be kind."}, USER, SO, {"role": "user", "content": "And?"}, NO]
    assert parse({"messages": messages}) == Row(
        f"\n\nHuman: Be kind.\nWhy?{CUE} So.\n\nHuman: And?{CUE}", (" No.",), (0.0,)
    )


@pytest.mark.parametrize(
    ("stage", "row", "native"),
    [
        ("sft", {"query": "p", "response": "r"}, {"prompt": "p", "response": "r"}),
        ("sft", {"query": "p", "response": ["r", "s"], "score": [0.5, 2]}, {"prompt": "p", "response": "s"}),
        (
            "reward",
            {"query": "p", "response": ["r", "s", "t"], "score": [0.5, 2, 2]},
            {"query": "p", "response": ["r", "s", "t"], "score": [0.5, 2.0, 2.0]},
        ),
        ("rlhf", {"prompt": "p", "rubric": {}}, {"prompt": "p"}),
    ],
)
def test_native_rows_are_kept_word_for_word(tmp_path, stage, row, native):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(row) + "\n\n")
    assert load_rows(file, stage) == [native]


BAD = [
    (b'{"prompt": ', r"rows.jsonl:2: line: not JSON"),
    (b"[1]", r"rows.jsonl:2: line: \[1\]: expected a JSON object"),
    (b'{"prompt": "\xff"}', r"rows.jsonl:2: line: not UTF-8 at byte 12"),
    (b'{"text": "x"}', r"rows.jsonl:2: prompt: missing; the fields are text"),
    (b'{"prompt": 5}', r"rows.jsonl:2: prompt: 5: expected a string"),
    (b'{"prompt": "p", "response": null}', r"rows.jsonl:2: response: None: expected a string"),
    pytest.param(
        b'{"query": "p", "response": ["a", "b"], "score": [1' + b"0" * 400 + b", 1]}",
        r"rows.jsonl:2: score: .*finite",
        id="1e400",
    ),
    pytest.param(b"[" * 200_000, r"rows.jsonl:2: line: not JSON", id="nested"),
    (b'{"prompt": "\\ud800"}', r"rows.jsonl:2: prompt: .*half of a surrogate pair"),
    (b'{"query": "q", "response": ["a", 1], "score": [1, 0]}', r"rows.jsonl:2: response\[1\]: 1: expected a string"),
    (
        b'{"query": "q", "response": ["a", "b"], "score": [1, NaN]}',
        r"rows.jsonl:2: score: \[1, nan\]: expected a list of finite",
    ),
    (b'{"query": "q", "response": ["a", "b"], "score": [1]}', r"rows.jsonl:2: score: 1 scores for 2 responses"),
    (b'{"query": "q", "response": ["a", "b"]}', r"rows.jsonl:2: score: None: expected"),
    (b'{"chosen": "hello", "rejected": "x"}', r"rows.jsonl:2: chosen: no turn begins with"),
    (
        b'{"messages": [{"role": "user", "content": "x"}]}',
        r"rows.jsonl:2: messages\[0\].role: 'user': expected the last",
    ),
    (b'{"messages": [{"role": "tool", "content": "x"}]}', r"rows.jsonl:2: messages\[0\].role: 'tool': expected system"),
    (b'{"messages": [{"role": "user"}]}', r'rows.jsonl:2: messages\[0\]: .*expected \{"role", "content"\}'),
    (b'{"messages": []}', r"rows.jsonl:2: messages: \[\]: expected a list of messages"),
    (
        b'{"prompt": [{"role": "assistant", "content": "x"}]}',
        r"rows.jsonl:2: prompt\[0\].role: 'assistant': expected the last .* user's",
    ),
    (
        b'{"prompt": "p", "respones": "r"}',
        r"rows.jsonl:2: respones: no field of any format, .* did you mean response\?",
    ),
    (
        b'{"prompt": "p", "completions": ["r"], "labels": [true]}',
        r"rows.jsonl:2: completions: .* did you mean completion\?",
    ),
    (b'{"prompt": "p", "chosen": "r"}', r"rows.jsonl:2: rejected: missing, but chosen is there"),
    (b'{"prompt": "p", "rejected": "r"}', r"rows.jsonl:2: chosen: missing, but rejected is there"),
    (
        b'{"chosen": [{"role": "assistant", "content": "x"}], "rejected": [{"role": "assistant", "content": "y"}]}',
        r"rows.jsonl:2: prompt: missing, and chosen",
    ),
    (b'{"prompt": "p", "completion": "r", "label": "yes"}', r"rows.jsonl:2: label: 'yes': expected true or false"),
    (b'{"prompt": "p", "completion": 3}', r"rows.jsonl:2: completion: 3: expected a string"),
]


@pytest.mark.parametrize(("line", "message"), BAD)
def test_a_bad_row_is_named_by_file_line_and_field_or_skipped_and_counted(tmp_path, line, message):
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b'{"prompt": "good"}\n' + line + b"\n")
    with pytest.raises(DataError, match=message) as error:
        load_rows(file, "rlhf")
    assert error.value.exit_code == 65 and "\n" not in str(error.value)
    counts = Counter()
    assert len(list(iterate(file, "rlhf", counts, skip_bad_rows=True))) == 1
    assert counts["rows"] == 2 and sum(counts.values()) == 3


@pytest.mark.parametrize(
    ("chosen", "rejected", "reason"),
    [
        (f"{Q}{CUE} So.", f"\n\nHuman: What?{CUE} No.", "prompts of chosen and rejected differ"),
        (f"{Q}{CUE}", f"{Q}{CUE} No.", "empty reply"),
        (f"{Q}{CUE} So.", f"{Q}{CUE}  ", "empty reply"),
        (f"{Q}{CUE} So.", f"{Q}{CUE} So.", "replies or their scores are equal"),
        (f"{Q}{CUE} So.  Human: And?", f"{Q}{CUE} No.", "role marker inside the better reply"),
    ],
)
def test_oddities_of_hh_are_counted_by_reason(chosen, rejected, reason):
    with pytest.raises(Unusable, match=reason):
        parse({"chosen": chosen, "rejected": rejected})


@pytest.mark.parametrize(
    ("prompt", "found"),
    [
        (Q + CUE, []),
        (f"{Q}\n\nHuman: Well?{CUE}", ["speakers do not alternate"]),
        (f"{Q}{CUE} So.{CUE}", ["speakers do not alternate"]),
        (f"\n\nHuman: He said. Assistant: fine{CUE}", ["role marker inside a turn"]),
        (f"{Q} Human:\n\nHuman: x{CUE}", ["speakers do not alternate", "role marker inside a turn"]),
        ("\n\nHuman: A subHuman: is no marker" + CUE, []),
    ],
)
def test_oddities_that_are_kept_are_named_and_change_no_text(prompt, found):
    assert dialogue.oddities(prompt) == found
    assert parse({"chosen": prompt + " So.", "rejected": prompt + " No."}) == Row(prompt, (" So.", " No."), (1.0, 0.0))


def test_a_marker_in_the_worse_reply_is_what_makes_it_worse():
    assert parse({"chosen": f"{Q}{CUE} So.", "rejected": f"{Q}{CUE} No. Human: x"}).responses[1] == " No. Human: x"


def test_a_pointer_in_place_of_the_data_is_called_by_its_name(tmp_path):
    file = tmp_path / "train.jsonl.gz"
    file.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(
        DataError, match="train.jsonl.gz: a git-LFS pointer, not the data itself; fetch it with `git lfs pull`"
    ):
        load_rows(file, "sft")


def test_compressed_files_and_broken_ones(tmp_path):
    file = tmp_path / "rows.jsonl.gz"
    data = gzip.compress(b"\xef\xbb\xbf" + b'{"prompt": "p"}\n' * 1000)
    file.write_bytes(data)
    assert len(load_rows(file, "rlhf")) == 1000
    for broken, message in ((data[:-20], ": can't be read: "), (b"plain text", ":1: line: not JSON")):
        file.write_bytes(broken)
        with pytest.raises(DataError, match=f"rows.jsonl.gz{message}"):
            load_rows(file, "rlhf")
    with pytest.raises(DataError, match="absent.jsonl: can't be read: No such file"):
        load_rows(tmp_path / "absent.jsonl", "rlhf")


def test_a_file_without_a_usable_row_says_why(tmp_path, demo_run):
    file, tokenizer = tmp_path / "rows.jsonl", Tokenizer(demo_run / "model")
    file.write_text("")
    with pytest.raises(DataError, match="no usable row for rlhf: the file is empty"):
        cached(file, "rlhf", tokenizer)
    file.write_text('{"prompt": " "}\n' * 3)
    with pytest.raises(DataError, match="no usable row for rlhf: 3 rows read; dropped: 3 empty prompt"):
        cached(file, "rlhf", tokenizer)
    with pytest.raises(DataError, match="absent.jsonl: can't be read: .*No such file"):
        cached(tmp_path / "absent.jsonl", "rlhf", tokenizer)
