"""Held-out prompts of a chat model: the evaluation has the ids of training, with tools and further
variables, and a reward model scores the row that it was trained on."""

import json

import pytest
from transformers import PreTrainedTokenizerFast

from eval.answers import heldout
from eval.answers.generation import encode
from eval.errors import DataError
from eval.scores.reward_model import _ids
from tests.support.chat_templates import CHATML, HEADERS, TOOLS, write_tokenizer
from training.data.rows import parse
from training.data.template import ChatTemplate
from training.data.tokenizer import Tokenizer

ASK, SAY = {"role": "user", "content": "What is 2+2?"}, {"role": "assistant", "content": "It's four."}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


@pytest.mark.parametrize("template", [CHATML, HEADERS, TOOLS])
@pytest.mark.parametrize("extra", [{}, {"tools": [TOOL], "chat_template_kwargs": {"enable_thinking": True}}])
def test_prompts_and_scored_rows_have_the_ids_of_training(template, extra, tmp_path):
    folder = write_tokenizer(tmp_path, template)
    ours, reference = ChatTemplate.read(Tokenizer(folder)), PreTrainedTokenizerFast.from_pretrained(folder)
    row = parse({"prompt": [ASK], "chosen": [SAY], "rejected": [ASK | {"role": "assistant"}], **extra}, ours.style())
    trained = ours.tokenise([row], "reward")[0]
    (tmp_path / "heldout.jsonl").write_text(json.dumps(row.as_native("rlhf")) + "\n")
    (prompt,) = heldout.load(str(tmp_path / "heldout.jsonl"))
    assert encode(reference, prompt.text(reference), 512, prompt.is_chat) == trained.prompt
    assert _ids(reference, prompt, SAY["content"], 512) == trained.prompt + trained.replies[0]


def test_a_prompt_that_is_no_text_and_no_message_is_named(tmp_path):
    (tmp_path / "heldout.jsonl").write_text('{"prompt": [1]}\n')
    with pytest.raises(DataError, match=r"row 1: prompt = \[1\]: expected a non-empty string, or messages"):
        heldout.load(str(tmp_path / "heldout.jsonl"))
