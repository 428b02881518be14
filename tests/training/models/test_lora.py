"""Adapters beside plain torch on Hugging Face's model; over layouts; merged by the export and by
the next stage; as its own reference."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, BloomConfig, BloomForCausalLM

from conversion.config import ExportConfig, ExportPaths
from conversion.megatron_to_hf import export
from conversion.weights import entries
from launcher.estimates import memory
from tests.support.distributed import run
from tests.support.ppo_weights import weights
from training import ppo, sft
from training.checkpoint import format, strategies
from training.checkpoint.stage_folder import StageFolder
from training.config.shape import Shape
from training.data.batches import Sampler, sft_example
from training.data.rows import parse
from training.data.tokenised import TextTokenizer
from training.data.tokenizer import Tokenizer
from training.generation.weight_sync import named_weights
from training.models import lora
from training.trainer.step import Learner, build_model

RANK, ALPHA = 4, 8.0


def rows(stage) -> list[dict]:
    return [json.loads(line) for line in (stage / "metrics.jsonl").read_text().splitlines()]


def settings(small_run, output, layout=(1, 1), **values):
    return small_run.sft(
        output,
        layout=layout,
        **(
            dict(
                iterations=4,
                eval_every=4,
                lora_rank=RANK,
                lora_alpha=ALPHA,
                lr=2e-2,
                schedule="constant",
                weight_decay=0.1,
            )
            | values
        ),
    )


class LowRank(torch.nn.Module):
    """Hugging Face's linear layer with adapters, as the paper writes it."""

    def __init__(self, base: torch.nn.Linear, a: torch.Tensor, b: torch.Tensor):
        super().__init__()
        self.base, self.a, self.b = base.requires_grad_(False), torch.nn.Parameter(a), torch.nn.Parameter(b)

    def forward(self, x):
        return self.base(x) + ALPHA / RANK * (x @ self.a.T @ self.b.T)


def adapters(config) -> dict:
    """Fresh A and B by Hugging Face's name, from ours on one rank."""
    shape = Shape.read(config.paths.model)
    model = build_model(shape, config, "lm")
    format.load_weights(StageFolder(config.paths.init).resolve() / "model", model)
    return named(config, model)


def named(config, model) -> dict:
    """Hugging Face's name -> A and B."""
    names = {entry.parameter: entry.name.removesuffix(".weight") for entry in entries(Shape.read(config.paths.model))}
    return {
        names[f"decoder.layers.{number}.{name}.weight"]: (
            module.lora_a.detach().clone(),
            module.lora_b.detach().clone(),
        )
        for name, number, module in lora.adapted(model)
    }


def plain(config, start: dict, added: dict) -> tuple[list[dict], BloomForCausalLM]:
    """SFT of the adapters in plain torch, one unpadded row at a time."""
    model = BloomForCausalLM(BloomConfig.from_pretrained(config.paths.model)).eval()
    model.transformer.load_state_dict(start)
    model.tie_weights()
    model.requires_grad_(False)
    for name, (a, b) in added.items():
        parent, _, child = name.rpartition(".")
        owner = model.transformer.get_submodule(parent)
        setattr(owner, child, LowRank(getattr(owner, child), a, b))
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        learning, lr=config.lr, betas=(config.adam_beta1, config.adam_beta2), weight_decay=config.weight_decay
    )
    with open(config.paths.train) as file:
        tokenizer = Tokenizer(config.paths.model)
        data = TextTokenizer(tokenizer).tokenise([parse(json.loads(line)) for line in file], "sft")
    sampler, made = Sampler(len(data), config.global_batch_size, config.seed), []
    for _ in range(config.iterations):
        losses = []
        for example in (sft_example(data[index], config.seq_length) for index in sampler.next_batch()):
            odds = model(torch.tensor([example.tokens])).logits[0, :-1].log_softmax(-1)
            losses.append(
                -odds[torch.arange(len(odds)), torch.tensor(example.tokens[1:])][example.response_start - 1 :]
            )
        loss = torch.cat(losses).mean()
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(learning, config.clip_grad).item()
        optimizer.step()
        made.append({"loss": loss.item(), "grad_norm": norm})
    return made, model


@pytest.fixture(scope="module")
def expected(small_run, tmp_path_factory):
    config = settings(small_run, tmp_path_factory.mktemp("plain"))
    start, _ = run(weights, 1, 1, 1, small_run.sft(config.paths.output), config.paths.init, "lm")[0]
    return plain(config, start, run(adapters, 1, 1, 1, config)[0])


@pytest.mark.parametrize(
    ("layout", "values"),
    [
        ((1, 1, 1), {}),
        ((2, 1, 1), {}),
        ((1, 2, 2), {"micro_batch_size": 1, "recompute": "full"}),
        ((2, 2, 1), {"sequence_parallel": True, "recompute": "selective"}),
        ((2, 1, 1), {"sequence_parallel": True, "recompute": "full"}),
    ],
)
def test_training_equals_plain_torch_on_every_layout(small_run, expected, tmp_path, layout, values):
    run(sft.run, *layout, settings(small_run, tmp_path, layout=layout[:2], **values))
    for number, (ours, theirs) in enumerate(zip(rows(tmp_path), expected[0], strict=True)):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5 if number == 0 else 2e-4), number
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4 if number == 0 else 2e-3), number


def look(config, folder, merged: bool):
    """Logits of the stage's model: with its adapters, or loaded as the next stage loads it, which
    has none; and without the adapters."""
    shape = Shape.read(config.paths.model)
    model = build_model(shape, config, "lm").eval()
    tokens = torch.arange(5, 25)[None]
    with torch.no_grad():
        if merged:
            format.load_weights(folder, model)
            return model(tokens).logits()
        format.load_weights(StageFolder(config.paths.init).resolve() / "model", model)
        before = model(tokens).logits()
        state = strategies.load({"model": model.sharded_state_dict()}, folder)["model"]
        model.load_state_dict(state, strict=False)
        adapted = model(tokens).logits()
        sent = named_weights(model)  # what the rollout engine samples with
        assert not any("lora" in name for name in sent)
        with lora.without(model):
            after = model(tokens).logits()
            for name, number, layer in lora.adapted(model):
                layer.weight.copy_(sent[f"decoder.layers.{number}.{name}.weight"])
            assert torch.allclose(model(tokens).logits(), adapted, atol=2e-5)
        return adapted, before, after


@pytest.mark.parametrize("family", ["bloom", "llama", "qwen2", "qwen3"])
def test_merged_by_export_and_by_the_next_stage(family_run, expected, tmp_path, family):
    """Trained at TP 2; the Hugging Face folder, the next stage's model at TP 2, and plain torch's
    model (of BLOOM) give the same logits."""
    made = family_run(family)
    config = settings(made, tmp_path / "sft", layout=(2, 1))
    run(sft.run, 2, 1, 1, config)
    folder = StageFolder(tmp_path / "sft").resolve() / "model"
    adapted, before, without = run(look, 1, 1, 1, settings(made, tmp_path), folder, False)[0]
    assert torch.equal(before, without) and (adapted - before).abs().max() > 0.1
    with torch.no_grad():
        if family == "bloom":
            assert torch.allclose(adapted, expected[1](torch.arange(5, 25)[None]).logits, atol=5e-3)
        first, second = run(look, 2, 1, 1, made.sft(tmp_path, layout=(2, 1)), folder, True)
        merged = torch.cat((first, second), -1)[..., : adapted.size(-1)]
        assert torch.allclose(merged, adapted, atol=2e-5)
        export(ExportConfig(paths=ExportPaths(str(tmp_path), made.model, {"sft": str(tmp_path / "sft")}), dtype="fp32"))
        exported = AutoModelForCausalLM.from_pretrained(tmp_path / "sft", dtype=torch.float32).eval()
        assert torch.allclose(
            exported(torch.arange(5, 25)[None]).logits, adapted[..., : exported.config.vocab_size], atol=2e-5
        )


def held(config) -> tuple[int, int, int, int]:
    """Elements that learn, of their gradients, of the optimizer's master weights and moments, of
    the whole model."""
    model = build_model(Shape.read(config.paths.model), config, "scalar")
    format.load_weights(StageFolder(config.paths.init).resolve() / "model", model, fresh_head=1)
    learner = Learner(model, config, config.lr, 1, 0)
    learner.optimizer._init_optimizer_states_with_dummy_values()
    states = [
        value
        for state in learner.optimizer.optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor) and value.dim()
    ]
    return (
        sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        sum(buffer.numel for buffer in learner.wrapped[0].buffers),
        sum(value.numel() for value in states),
        sum(parameter.numel() for parameter in model.parameters()),
    )


def test_the_optimizer_holds_adapters_and_the_scalar_head_only(small_run, tmp_path):
    """And launcher/estimates/memory.py counts them."""
    config = settings(small_run, tmp_path)
    learning, gradients, moments, whole = run(held, 1, 1, 1, config)[0]
    shape = Shape.read(config.paths.model)
    assert learning == memory.Rank(shape, config, 1, 0).adapters("scalar") + shape.hidden + 1 and learning < whole / 4
    assert learning <= gradients < learning + 1024 and moments < 3 * gradients


def test_ppo_of_adapters_is_its_own_reference(small_run, tmp_path):
    """KL exactly 0 before the first update, not after it; the same numbers on two layouts; the
    frozen weights have not moved."""
    for name, layout in (("one", (1, 1, 1)), ("four", (2, 2, 1))):
        run(
            ppo.run,
            *layout,
            small_run.ppo(tmp_path / name, layout=layout[:2], iterations=3, lora_rank=4, lr=5e-3, value_lr=5e-3),
        )
    one, four = rows(tmp_path / "one"), rows(tmp_path / "four")
    assert one[0]["kl"] == 0 and one[2]["kl_k3"] > 1e-4 and one[2]["value_loss"] != one[1]["value_loss"]
    for name in ("kl", "reward", "policy_loss", "value_loss", "grad_norm", "value_grad_norm"):
        assert four[1][name] == pytest.approx(one[1][name], rel=2e-3, abs=2e-5), name
    config = small_run.ppo(tmp_path, lora_rank=4)
    adapted, before, without = run(look, 1, 1, 1, config, StageFolder(tmp_path / "one").resolve() / "policy", False)[0]
    assert torch.equal(before, without) and not torch.equal(adapted, before)


def drawn(config) -> tuple[torch.Tensor, dict]:
    """Logits with random A and B, and these."""
    model = build_model(Shape.read(config.paths.model), config, "lm").eval()
    format.load_weights(StageFolder(config.paths.init).resolve() / "model", model)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for _, _, module in lora.adapted(model):
            for parameter in (module.lora_a, module.lora_b):
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
        return model(torch.arange(5, 25)[None]).logits(), named(config, model)


def test_logits_equal_peft_s(small_run, tmp_path):
    """Where peft is installed (make peers): the same A and B give the same logits, merged or
    not."""
    peft = pytest.importorskip("peft", reason="needs peft: make peers")
    config = settings(small_run, tmp_path)
    base, _ = run(weights, 1, 1, 1, small_run.sft(tmp_path), config.paths.init, "lm")[0]
    ours, added = run(drawn, 1, 1, 1, config)[0]
    theirs = BloomForCausalLM(BloomConfig.from_pretrained(config.paths.model)).eval()
    theirs.transformer.load_state_dict(base)
    theirs.tie_weights()
    targets = sorted({name.rpartition(".")[2] for name in added})
    model = peft.get_peft_model(theirs, peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets)).eval()
    with torch.no_grad():
        for name, (a, b) in added.items():
            layer = model.base_model.model.transformer.get_submodule(name)
            layer.lora_A["default"].weight.copy_(a)
            layer.lora_B["default"].weight.copy_(b)
        for each in (model, model.merge_and_unload()):
            assert torch.allclose(each(torch.arange(5, 25)[None]).logits, ours, atol=1e-5)
