"""A Llama's tokenizer: SentencePiece with byte fallback, as tokenizer.model and as the
tokenizer.json that transformers makes of it."""

import json

import pytest
import sentencepiece
from transformers import AutoTokenizer, LlamaTokenizer

from training.data.tokenizer import Tokenizer

TEXTS = [
    "\n\nHuman: What is the capital of France?\n\nAssistant: Paris, of course. It lies on the Seine.",
    "\n\nHuman: Tell me a story about two cats.\n\nAssistant: Once there were two cats, who slept all day in 1999.",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("llama")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(50 * TEXTS),
        model_prefix=str(made / "tokenizer"),
        model_type="bpe",
        vocab_size=330,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        minloglevel=2,
    )
    (made / "config.json").write_text('{"model_type": "llama"}')
    LlamaTokenizer.from_pretrained(made).save_pretrained(made)
    return made


def test_a_tokenizer_with_or_without_a_padding_token_gives_sentencepiece_s_ids(folder):
    assert Tokenizer(folder).pad_id == Tokenizer(folder).eos_id == 2
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pad_token": "<unk>"}))
    ours, theirs = Tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    original = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    assert (ours.size, ours.eos_id, ours.pad_id) == (330, 2, 0)
    for text in (*TEXTS, "no such words: déjà vu 😀", "two  spaces\n\n\tand a tab"):
        assert ours.encode(text) == original.encode(text) == theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.decode(ours.encode(text)) == text
    # A reply begins with one space. Alone it gets the tokens that it has behind its prompt, not a
    # second space.
    prompt, reply = TEXTS[0][: TEXTS[0].index(" Paris")], TEXTS[0][TEXTS[0].index(" Paris") :]
    assert ours.encode(prompt) + ours.encode(reply) == ours.encode(prompt + reply) == original.encode(TEXTS[0])
