"""Two tiny random BLOOMs with a byte-level BPE tokenizer in BLOOM's form, as Hugging Face
folders."""

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import BloomConfig, BloomForCausalLM, BloomForSequenceClassification, PreTrainedTokenizerFast

from tests.support.judge import serve  # noqa: F401  (a fixture)

TEXT = (
    "\n\nHuman: What is the colour of the sky, and why?"
    "\n\nAssistant: It is blue, because the air scatters blue light most."
)


def tokenizer() -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        [TEXT] * 3,
        trainers.BpeTrainer(
            vocab_size=320,
            special_tokens=["<unk>", "<s>", "</s>", "<pad>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        clean_up_tokenization_spaces=False,
    )


@pytest.fixture(scope="session")
def folders(tmp_path_factory) -> dict[str, Path]:
    """{"sft": folder, "rlhf": folder}: the second is the first with a little noise, so that their
    KL is small and above 0."""
    torch.manual_seed(0)
    words = tokenizer()
    model = BloomForCausalLM(
        BloomConfig(
            vocab_size=len(words),
            hidden_size=24,
            n_layer=2,
            n_head=3,
            initializer_range=0.3,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=3,
        )
    )
    made = {}
    for name in ("sft", "rlhf"):
        made[name] = tmp_path_factory.mktemp(name)
        model.save_pretrained(made[name])
        words.save_pretrained(made[name])
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(0.02 * torch.randn_like(weight))
    return made


@pytest.fixture(scope="session")
def judge(folders, tmp_path_factory) -> Path:
    """A reward model on the sft model's body, as export makes one."""
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("judge")
    model = BloomForSequenceClassification.from_pretrained(folders["sft"], num_labels=1, pad_token_id=3)
    with torch.no_grad():
        model.score.weight.normal_()
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder
