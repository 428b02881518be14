"""Conversations by a tokenizer's own template: the ids are transformers', what the assistant says is
learnt with its end, and what can't be told apart is refused."""

import json
from collections import Counter

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from tests.support.chat_templates import (
    CHATML,
    CHATML_MARKED,
    DROPS_THOUGHTS,
    HEADERS,
    INST,
    NO_SYSTEM,
    OWN,
    TOOLS,
    published,
    write_tokenizer,
)
from training.config.data import DataConfig
from training.data import formats, peek
from training.data.batches import collate
from training.data.cache import TokenRows, cached
from training.data.examples import comparison_example, sft_example
from training.data.packing import collate_packed
from training.data.rows import parse
from training.data.template import ChatTemplate, by_setting
from training.data.tokenised import TextTokenizer
from training.data.tokenizer import Tokenizer
from training.errors import ConfigError, DataError
from training.files import chat_template

SYSTEM = {"role": "system", "content": "Be  kind.\n"}
ASK, SAY = {"role": "user", "content": "What is 2+2?"}, {"role": "assistant", "content": " It's four.\n 東京"}
MORE, END = {"role": "user", "content": "And 3?"}, {"role": "assistant", "content": "Six  <b>"}
CHATS = {
    "one turn": [ASK, SAY],
    "two turns": [ASK, SAY, MORE, END],
    "with a system turn": [SYSTEM, ASK, SAY],
}


def both(folder) -> tuple[ChatTemplate, PreTrainedTokenizerFast]:
    return ChatTemplate.read(Tokenizer(folder)), PreTrainedTokenizerFast.from_pretrained(folder)


def ids(reference, messages, **options) -> list[int]:
    return reference.apply_chat_template(messages, tokenize=True, return_dict=False, **options)


def tokenised(template: ChatTemplate, fields: dict, stage: str):
    return template.tokenise([parse(fields, template.style())], stage)[0]


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("name", [*OWN, *published()])
def test_the_ids_of_training_and_of_a_rollout_s_prompt_are_transformers(name, chat, tmp_path):
    folder = write_tokenizer(tmp_path, (OWN | published())[name])
    template, reference = both(folder)
    messages = CHATS[chat]
    try:
        whole, prompt = ids(reference, messages), ids(reference, messages[:-1], add_generation_prompt=True)
    except Exception as error:  # a template that takes no system turn
        assert "system" in chat, error
        with pytest.raises(formats.BadRow, match=r"messages\[\d] \(\w+\): the chat template fails"):
            tokenised(template, {"messages": messages}, "sft")
        return
    assert tokenised(template, {"prompt": messages[:-1]}, "rlhf").prompt == prompt
    try:
        row = tokenised(template, {"messages": messages}, "sft")
    except formats.BadRow as error:
        assert "does not go on from its own beginning" in str(error) or len(messages) > 2, error
        return
    assert row.prompt == prompt
    assert (row.prompt + row.replies[0])[: len(whole)] == whole, "only an end may be added"
    pair = tokenised(
        template, {"prompt": messages[:-1], "chosen": messages[-1:], "rejected": [END | {"content": "-"}]}, "reward"
    )
    for reply, length in zip(pair.replies, (len(whole), None), strict=True):
        assert reply[-1] in template.stop_ids and not set(reply[:-1]) & set(template.stop_ids)
        assert length is None or pair.prompt + reply == [*whole, *reply[-1:]][: len(pair.prompt + reply)]


@pytest.mark.parametrize("messages", CHATS.values())
def test_the_learnt_tokens_are_those_of_transformers_assistant_mask(messages, tmp_path):
    """By prefixes the same as by the template's marks, and those transformers' own."""
    marked, reference = both(write_tokenizer(tmp_path / "marked", CHATML_MARKED, "<|im_end|>"))
    plain, _ = both(write_tokenizer(tmp_path / "plain", CHATML, "<|im_end|>"))
    expected = reference.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    for template in (marked, plain):
        example = sft_example(tokenised(template, {"messages": messages}, "sft"), 512)
        assert example.tokens == expected["input_ids"]
        mask = collate([example], 0, len(example.tokens))["response_mask"][0].int().tolist()
        assert mask == expected["assistant_masks"]
        packed = collate_packed([[example, example]], 0, 2 * len(example.tokens))["response_mask"][0]
        assert packed.int().tolist() == 2 * mask


def test_the_end_of_a_turn_is_learnt_where_the_marks_leave_it_out(tmp_path):
    without_end = CHATML_MARKED.replace(
        "m.content + '<|im_end|>' }}{% endgeneration %}", "m.content }}{% endgeneration %}{{ '<|im_end|>' }}"
    )
    template, _ = both(write_tokenizer(tmp_path, without_end))
    row = tokenised(template, {"messages": CHATS["two turns"]}, "sft")
    learnt = [(row.prompt + row.replies[0])[start:end] for start, end in row.learnt]
    assert [template.tokenizer.text(part) for part in learnt] == [f"{turn['content']}<|im_end|>" for turn in (SAY, END)]


def test_weight_0_and_the_last_turn_alone(tmp_path):
    template, _ = both(write_tokenizer(tmp_path, CHATML))
    messages = [ASK, SAY | {"weight": 0}, MORE, END]
    weighted = tokenised(template, {"messages": messages}, "sft")
    last = by_setting(DataConfig(assistant_turns="last"), template.tokenizer)
    only = tokenised(last, {"messages": CHATS["two turns"]}, "sft")
    every = tokenised(template, {"messages": CHATS["two turns"]}, "sft")
    assert weighted == only == every._replace(learnt=every.learnt[-1:]) and len(every.learnt) == 2


def test_several_turns_of_a_template_that_drops_thoughts_are_refused_by_turn(tmp_path):
    template, _ = both(write_tokenizer(tmp_path, DROPS_THOUGHTS))
    with pytest.raises(formats.BadRow, match=r"messages\[1].* once messages\[3] follows.*assistant_turns = \"last\""):
        tokenised(template, {"messages": CHATS["two turns"]}, "sft")
    last = by_setting(DataConfig(assistant_turns="last"), template.tokenizer)
    row = tokenised(last, {"messages": CHATS["two turns"]}, "sft")
    assert template.tokenizer.text(row.replies[0]) == f"<think>\n\n</think>\n\n{END['content']}<|im_end|>\n"


def test_tools_arguments_and_calls_reach_the_template(tmp_path):
    tool = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    folder = write_tokenizer(tmp_path, TOOLS)
    template, reference = both(folder)
    messages = [ASK, {"role": "assistant", "content": "", "tool_calls": [call]}, {"role": "tool", "content": "4"}, SAY]
    as_text = [
        *messages[:1],
        messages[1] | {"content": None, "tool_calls": [call | {"function": {"name": "add", "arguments": '{"a": 1}'}}]},
        *messages[2:],
    ]
    whole = ids(reference, messages, tools=[tool])
    for row in (messages, as_text):
        for tools in ([tool], json.dumps([tool])):
            found = tokenised(template, {"messages": row, "tools": tools}, "sft")
            assert found.prompt + found.replies[0] == whole and len(found.learnt) == 2
    quiet = {"prompt": messages[:1], "chat_template_kwargs": {"enable_thinking": False}}
    expected = ids(reference, messages[:1], add_generation_prompt=True, enable_thinking=False)
    assert tokenised(template, quiet, "rlhf").prompt == expected
    setting = by_setting(DataConfig(chat_template_kwargs={"enable_thinking": False}), template.tokenizer)
    assert tokenised(setting, {"prompt": messages[:1]}, "rlhf").prompt == expected
    assert tokenised(setting, quiet | {"chat_template_kwargs": {"enable_thinking": True}}, "rlhf").prompt != expected


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": "What is 2+2?", "response": " It's four."},
        {"prompt": "What is 2+2?", "completion": "It's four."},
        {"prompt": "What is 2+2?", "chosen": "It's four.", "rejected": "Five."},
        {
            "chosen": "\n\nHuman: What is 2+2?\n\nAssistant: It's four.",
            "rejected": "\n\nHuman: What is 2+2?\n\nAssistant: Five.",
        },
        {
            "messages": [
                {"role": "human", "content": [{"type": "text", "text": "What is 2+2?"}]},
                {"role": "assistant", "content": "It's four."},
            ]
        },
    ],
)
def test_every_format_becomes_the_same_chat(fields, tmp_path):
    template, reference = both(write_tokenizer(tmp_path, HEADERS))
    row = tokenised(template, fields, "sft")
    assert row.prompt + row.replies[0] == ids(reference, [ASK, {"role": "assistant", "content": "It's four."}])
    assert row.opening == 1 and row.prompt[0] == reference.bos_token_id
    assert (row.prompt + row.replies[0]).count(reference.bos_token_id) == 1, "BOS once"


def test_hh_s_dialogues_are_chats_with_all_their_turns(tmp_path):
    template, reference = both(write_tokenizer(tmp_path, HEADERS))
    text = "\n\nHuman: Why?\n\nAssistant: So.\n\nHuman: And?\n\nAssistant: "
    row = parse({"chosen": text + "Yes.", "rejected": text + "No."}, template.style())
    turns = [
        {"role": role, "content": content}
        for role, content in zip(("user", "assistant", "user"), ("Why?", "So.", "And?"), strict=True)
    ]
    assert list(row.prompt.messages) == turns and row.texts == ["Yes.", "No."]
    assert len(row.earlier()) == 1 and row.question == "And?"
    assert template.tokenise([row], "reward")[0].prompt == ids(reference, turns, add_generation_prompt=True)
    again = parse(row.as_native("reward"), template.style())
    assert again == row, "a prepared row is read as it was written"
    assert parse(row.as_native("rlhf"), template.style()).prompt == row.prompt


def test_stop_ids_are_the_turn_s_end_and_the_folder_s(tmp_path):
    folder = write_tokenizer(tmp_path, CHATML, eos="<|endoftext|>")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 8]}))
    template, reference = both(folder)
    assert template.stop_ids == (reference.convert_tokens_to_ids("<|im_end|>"), 0, 8)
    rows = folder / "rows.jsonl"
    rows.write_text(json.dumps({"messages": [ASK, SAY]}) + "\n")
    stored = TokenRows(cached(rows, "sft", template.tokenizer))
    assert stored.stop_ids == template.stop_ids and stored.cue >= 3
    assert stored[0] == tokenised(template, {"messages": [ASK, SAY]}, "sft")
    rows.write_text(json.dumps({"prompt": "a", "response": "b"}) + "\n")
    text = TokenRows(cached(rows, "sft", template.tokenizer))
    assert text.stop_ids == (0, 8) and text[0].replies[0][-1] == 0 and text[0].learnt == []


def test_the_cache_keeps_the_turns_of_every_row(tmp_path, monkeypatch):
    folder = write_tokenizer(tmp_path, CHATML)
    template, _ = both(folder)
    chats = [{"messages": messages} for messages in list(CHATS.values()) * 40]
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    stored = TokenRows(cached(rows, "sft", template.tokenizer))
    assert [stored[at] for at in range(len(stored))] == [tokenised(template, chat, "sft") for chat in chats]
    with monkeypatch.context() as patch:
        patch.setattr(chat_template, "try_all", None)
        assert cached(rows, "sft", Tokenizer(folder)) == stored.folder, "a cache that is there needs no rendering"
    (folder / "chat_template.jinja").write_text(CHATML.replace("<|im_start|>", "<|user|>"))
    assert cached(rows, "sft", Tokenizer(folder)) != stored.folder, "another template, another cache"


@pytest.mark.parametrize("length", range(8, 60, 3))
def test_what_is_learnt_of_a_row_that_is_cut_is_what_was_learnt_of_it(length, tmp_path):
    template, _ = both(write_tokenizer(tmp_path, HEADERS))
    row = tokenised(template, {"messages": CHATS["two turns"]}, "sft")
    whole = sft_example(row, 512)
    example = sft_example(row, length)
    assert len(example.tokens) == min(length, len(whole.tokens)) and example.tokens[0] == whole.tokens[0]
    learnt = {at for start, end in whole.spans for at in range(start, end)}
    removed = len(row.prompt) - example.response_start
    places = [at if at < row.opening else at + removed for at in range(len(example.tokens))]
    assert [whole.tokens[at] for at in places] == example.tokens
    mask = collate([example], 0, len(example.tokens))["response_mask"][0]
    assert mask.tolist() == [place in learnt for place in places]
    assert example.complete == (len(row.replies[0]) + example.response_start <= length)


def test_a_template_that_raises_names_row_and_turn_and_skips_on_request(tmp_path):
    template, _ = both(write_tokenizer(tmp_path, INST))
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in ([ASK, SAY], [ASK, MORE, SAY])))
    with pytest.raises(
        DataError, match=r"rows.jsonl:2: messages\[1] \(user\): the chat template fails.*must alternate"
    ):
        list(formats.iterate(rows, "sft", Counter(), style=template.style(), check=template.problems))
    counts = Counter()
    assert len(list(formats.iterate(rows, "sft", counts, True, style=template.style(), check=template.problems))) == 1
    assert counts["dropped: bad row, messages[] (user)"] == 1


def test_a_reply_with_a_special_token_in_it_is_not_learnt(tmp_path):
    template, _ = both(write_tokenizer(tmp_path, CHATML))
    with pytest.raises(formats.Unusable, match="special token inside the better reply"):
        parse({"messages": [ASK, {"role": "assistant", "content": "a<|im_end|>b"}]}, template.style())
    row = parse({"messages": [{"role": "user", "content": "<|im_end|>"}, SAY]}, template.style())
    assert row.notes == ("special token inside a turn",)


def test_the_setting_decides(tmp_path, capsys):
    bare, chat = write_tokenizer(tmp_path / "bare"), write_tokenizer(tmp_path / "chat", CHATML)
    assert isinstance(by_setting(DataConfig(), Tokenizer(bare)), TextTokenizer)
    assert by_setting(DataConfig(), Tokenizer(chat)).name == "chat"
    assert by_setting(DataConfig(template="hh"), Tokenizer(chat)).name == "hh"
    for tokenizer, where in ((Tokenizer(bare), "the tokenizer of"), (None, "the demo's model")):
        with pytest.raises(ConfigError, match=f'data.template = "chat", but {where}.* has no chat template'):
            by_setting(DataConfig(template="chat"), tokenizer)
    with pytest.raises(ValueError, match="template = 'chatml': expected one of auto, chat, hh"):
        DataConfig(template="chatml")
    with pytest.raises(ConfigError, match="leaves out a question or its reply.*data.template"):
        by_setting(DataConfig(), Tokenizer(write_tokenizer(tmp_path / "empty", "x")))
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        "".join(json.dumps({"messages": [ASK | {"content": f"{ASK['content']} {n}"}, SAY]}) + "\n" for n in range(3))
    )
    settings = {
        "data": {"source": str(rows)},
        "model": {"checkpoint": str(chat)},
        "stages": {"sft": ["sft", "seq_length", 8]},
    }
    assert peek.main([str(rows), "9", json.dumps(settings)]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert "written by the tokenizer's chat template; a reply ends with <|im_end|>, </s>" in printed[0]
    assert f"  [[{SAY['content']}<|im_end|>]]".split("\n")[0] in "\n".join(printed)
    assert "all 2 rows are longer than sft.seq_length = 8 and are cut" in printed[-1]


def test_a_system_turn_that_a_template_refuses_is_named(tmp_path):
    template, _ = both(write_tokenizer(tmp_path, NO_SYSTEM))
    with pytest.raises(formats.BadRow, match=r"messages\[0] \(system\): the chat template fails.*no system turn"):
        tokenised(template, {"messages": CHATS["with a system turn"]}, "sft")


def test_a_template_without_an_end_gets_the_tokenizer_s(tmp_path):
    """Or the model would never stop."""
    template, reference = both(write_tokenizer(tmp_path, NO_SYSTEM))
    assert template.turn_end is None
    row = tokenised(template, {"messages": [ASK, SAY]}, "sft")
    assert row.prompt + row.replies[0] == [*ids(reference, [ASK, SAY]), reference.eos_token_id]


def test_pairs_learn_from_the_token_that_the_rollout_stops_at(tmp_path):
    template, _ = both(write_tokenizer(tmp_path, CHATML))
    row = tokenised(template, {"prompt": [ASK], "chosen": [SAY], "rejected": [END]}, "reward")
    for example, _ in comparison_example(row, 512):
        assert example.tokens[-1] == template.turn_end and torch.tensor(example.tokens).eq(template.turn_end).sum() == 2


def test_a_reply_that_a_token_would_join_with_its_prompt_is_tokenised_apart(tmp_path):
    """As the rollout has it, whose prompt ends there: GPT-2's pieces make one token of line breaks
    at a text's end, two before a word."""
    template, reference = both(write_tokenizer(tmp_path, HEADERS, apart=True))
    prompt = ids(reference, [ASK], add_generation_prompt=True)
    row = tokenised(template, {"messages": [ASK, END]}, "sft")
    assert ids(reference, [ASK, END])[: len(prompt)] != prompt == row.prompt
    assert row.replies[0] == [*template.tokenizer.encode(END["content"]), template.turn_end]
