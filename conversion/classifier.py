"""Reward and value models as Hugging Face's sequence classifiers: one label, no bias, read at the
last token that is no padding.

Their ``score`` layer has no bias. Ours has none either where the family's last norm has none
(Llama); where it has (BLOOM), ours has one, b. The score is w . (n * g + s) + b, with the last
layer norm's output n * g + s; s goes nowhere else, so s + b w / |w|^2 in place of s gives the same
score without a bias. Rounding that to bf16 would lose digits: each component's rounding error is
carried to the next, so that w . s' = w . s + b to about the smallest |w_i s_i| / 256.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

from conversion.tensors import Rows, Stored
from training.config.shape import Shape, family
from training.data.tokenizer import Tokenizer
from training.errors import ConfigError


def touched(shape: Shape) -> tuple[str, str, str]:
    """Hugging Face's names of a scalar head's weight and bias, and of the last norm's bias."""
    (bias,) = shape.table.last[-1].parts
    return "score.weight", "score.bias", bias


def calibration(source: Path) -> float:
    """What a checkpoint's folder of one model (".../iter_0000100/model") says is to be added to its
    scores: a reward model's bias, a value model's (".../value"); 0 for other models."""
    path, name = source.parent / "state.json", "value_bias" if source.name == "value" else "reward_bias"
    return (json.loads(path.read_text(encoding="utf-8")).get(name) or 0.0) if path.is_file() else 0.0


def without_bias(tensors: dict[str, Rows], shape: Shape, dtype: torch.dtype, added: float = 0.0) -> dict[str, Rows]:
    """The tensors of a model without ``score.bias`` that scores the same and ``added``, its last
    layer norm's bias in ``dtype``."""
    weight, bias, shift = touched(shape)
    rest = {name: tensor for name, tensor in tensors.items() if name != bias}
    value = tensors[bias].load().double().item() + added
    if value != 0:
        rest[shift] = Stored.of_tensor(folded(tensors[shift].load(), tensors[weight].load().to(dtype)[0], value, dtype))
    return rest


def folded(shift: torch.Tensor, weight: torch.Tensor, bias: float, dtype: torch.dtype) -> torch.Tensor:
    """``shift`` (H,) moved so that ``weight`` . shift grows by ``bias``, in ``dtype`` with rounding
    errors carried on."""
    weight, start = weight.double(), shift.double()
    square = (weight**2).sum().item()
    if square == 0:
        raise ConfigError(
            f"the scalar head's weights are all zero, its bias is {bias}: the model scores everything "
            "alike; train it first"
        )
    moved = shift.to(dtype).clone()
    left = bias  # of the growth that is wanted
    remaining = square
    # The largest weights first: the last ones, with the smallest steps, take up what rounding left.
    for index in weight.abs().argsort(descending=True).tolist():
        w = weight[index].item()
        if w == 0:
            break
        moved[index] = start[index] + left * w / remaining
        left -= w * (moved[index].double().item() - start[index].item())
        remaining -= w * w
        if remaining <= 1e-12 * square:
            break
    return moved


def set_config(folder: Path, shape: Shape) -> None:
    """Make the copied config.json that of a sequence classifier with one label, which finds the
    last token by the padding's id."""
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config.pop("num_labels", None)
    config |= {
        "architectures": [f"{family(shape.family).HUGGING_FACE}ForSequenceClassification"],
        "id2label": {"0": "score"},
        "label2id": {"score": 0},
        "problem_type": "regression",
    }
    if (folder / "tokenizer.json").is_file():
        _set_padding(folder, config)
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _set_padding(folder: Path, config: dict) -> None:
    """A padding token that is not EOS, in both files: the score is read at the last token that is
    none."""
    tokenizer, path = Tokenizer(folder), folder / "tokenizer_config.json"
    if tokenizer.pad_id == tokenizer.eos_id:
        settings = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        text = json.dumps({**settings, "pad_token": tokenizer.filler}, indent=2, ensure_ascii=False)
        path.write_text(text + "\n", encoding="utf-8")
    config["pad_token_id"] = Tokenizer(folder).pad_id
