"""Packing changes the rows, not the numbers; the loss is Hugging Face's own."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import tokenizers
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import BloomConfig, BloomForCausalLM

from tests.support.distributed import run
from tests.support.ppo_weights import weights
from training import sft
from training.data.batches import Sampler


def rows(stage) -> list[dict]:
    return [json.loads(line) for line in (stage / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("layout", "values"),
    [((1, 1, 1), {}), ((2, 2, 1), {"sequence_parallel": True}), ((1, 2, 2), {"micro_batch_size": 1})],
)
def test_packed_training_equals_unpacked_training(small_run, tmp_path, layout, values):
    """Four steps: loss, gradient norm and, since weights follow from them, the held-out loss at the
    end; fp32 rounding."""
    settings = dict(layout=layout[:2], iterations=4, eval_every=4, seq_length=96, global_batch_size=16, **values)
    for packing in (True, False):
        run(sft.run, *layout, small_run.sft(tmp_path / str(packing), packing=packing, **settings))
    packed, alone = rows(tmp_path / "True"), rows(tmp_path / "False")
    for ours, expected in zip(packed, alone, strict=True):
        assert ours["tokens"] == expected["tokens"]
        assert ours["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert ours["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)
        assert ours["packing_efficiency"] > expected["packing_efficiency"]
    assert packed[-1]["heldout_loss"] == pytest.approx(alone[-1]["heldout_loss"], rel=1e-5)


def test_the_loss_is_that_of_hugging_face_with_labels(small_run, tmp_path):
    """``model(labels=...)`` on the same examples, prompt and padding at -100: the first step's loss
    (packed, two ranks) and the held-out one. Rows, ids and EOS are made again here."""
    config = small_run.sft(tmp_path, iterations=1, lr=1e-30, seq_length=96, global_batch_size=16)
    config = replace(config, paths=replace(config.paths, init=str(small_run.folder / "sft")))
    run(sft.run, 1, 2, 1, replace(config, pipeline_parallel=2))
    model = BloomForCausalLM(BloomConfig.from_pretrained(config.paths.model)).eval()
    model.transformer.load_state_dict(run(weights, 1, 1, 1, config, config.paths.init, "lm")[0][0])
    model.tie_weights()
    tokenizer = tokenizers.Tokenizer.from_file(f"{config.paths.model}/tokenizer.json")

    def loss(lines: list[str]) -> float:
        tokens, labels = [], []
        for row in map(json.loads, lines):
            prompt, reply = (
                tokenizer.encode(row["prompt"]).ids,
                [*tokenizer.encode(row["response"]).ids, model.config.eos_token_id],
            )
            tokens.append(torch.tensor(prompt + reply))
            labels.append(torch.tensor([-100] * len(prompt) + reply))
        ids, targets, kept = (
            pad_sequence(rows, batch_first=True, padding_value=fill)
            for rows, fill in (
                (tokens, model.config.pad_token_id),
                (labels, -100),
                ([torch.ones_like(row) for row in tokens], 0),
            )
        )
        with torch.no_grad():
            return model(input_ids=ids, attention_mask=kept, labels=targets).loss.item()

    lines = Path(config.paths.train).read_text().splitlines()
    (row,) = rows(tmp_path)
    first = Sampler(len(lines), 16, config.seed).next_batch()
    assert row["loss"] == pytest.approx(loss([lines[index] for index in first]), rel=1e-5)
    assert row["heldout_loss"] == pytest.approx(loss(Path(config.paths.heldout).read_text().splitlines()), rel=1e-5)
    assert row["packing_efficiency"] > 0.8
