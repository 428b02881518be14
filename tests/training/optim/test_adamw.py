"""The optimizer with 6 bytes of state per parameter: what it stores exactly, what it rounds, and
that it learns like fp32 AdamW."""

import pytest
import torch

from tests.support.distributed import run
from tests.support.learners import SHAPE, fill, held, learner, settings, wrong
from training import sft
from training.checkpoint import format
from training.checkpoint.stage_folder import StageFolder
from training.checkpoint.writer import Saver
from training.data.batches import shard
from training.distributed import groups
from training.optim.adamw import SplitAdamW, joined, round_stochastically, split_
from training.trainer.step import Learner, Objective, build_model, split


def parameter(values: torch.Tensor, number: int = 0) -> torch.Tensor:
    weight = values.to(torch.bfloat16)
    weight.place = (number, 0)
    return weight


def test_two_halves_are_the_fp32_weight_and_the_model_s_is_it_rounded():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(100_000, generator=generator) * 10.0 ** torch.randint(-30, 30, (100_000,), generator=generator)
    values[:4] = torch.tensor([0.0, 1.0, -1.0, 3.3e38])
    weight, remainder = torch.zeros_like(values, dtype=torch.bfloat16), torch.zeros_like(values, dtype=torch.int16)
    split_(values, weight, remainder)
    assert torch.equal(joined(weight, remainder), values)
    nearest = values.bfloat16()
    ties = remainder == -(2**15)  # half way: away from zero where torch takes the even one
    assert torch.equal(weight[~ties], nearest[~ties])


def test_stochastic_rounding_is_right_on_average_and_the_same_again():
    value, draws = 1.0 + 0.3 / 128, 40_000  # bf16 has 1 and 1 + 1/128
    values = torch.full((draws,), value)
    rounded = round_stochastically(values, 7, 0)
    assert set(rounded.float().tolist()) == {1.0, 1.0078125}
    assert rounded.float().mean().item() == pytest.approx(value, abs=5 / 128 * (0.21 / draws) ** 0.5)
    assert torch.equal(rounded, round_stochastically(values, 7, 0)) and not torch.equal(
        rounded, round_stochastically(values, 8, 0)
    )
    parts = [round_stochastically(values[:1000], 7, 0), round_stochastically(values[1000:], 7, 1000)]
    assert torch.equal(rounded, torch.cat(parts))  # any division over ranks draws the same


def test_four_hundred_steps_follow_fp32_adamw():
    """A regression with noisy gradients, beta2 = 0.999: the second moment moves by less than bf16's
    spacing in most steps. Rounded to nearest it is off by twice the bound."""
    generator = torch.Generator().manual_seed(0)
    inputs, target = torch.randn(2000, 64, generator=generator), torch.randn(64, generator=generator)
    start = torch.zeros(64).bfloat16()
    options = dict(lr=0.01, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1)
    fp32_weight, bf16_weight = torch.nn.Parameter(start.float()), parameter(start)
    reference = torch.optim.AdamW([fp32_weight], **options)
    split = SplitAdamW([torch.nn.Parameter(torch.zeros(1))], **options)
    split.param_groups[0]["params"] = [bf16_weight]
    split.factor = torch.tensor(0.5)
    losses = []
    for step in range(400):
        rows = slice(5 * step, 5 * step + 5)
        fp32_weight.grad, bf16_weight.decoupled_grad = (
            factor * inputs[rows].T @ (inputs[rows] @ (weight.detach().float() - target))
            for weight, factor in ((fp32_weight, 0.2), (bf16_weight, 0.4))
        )
        reference.step()
        split.step()
        losses.append(
            [
                (inputs @ (weight - target)).square().mean().item()
                for weight in (fp32_weight.detach(), bf16_weight.float())
            ]
        )
    fp32, bf16 = torch.tensor(losses)[-100:].mean(0).tolist()
    assert bf16 == pytest.approx(fp32, rel=0.05), (fp32, bf16)
    state = split.state[bf16_weight]
    moment = reference.state[fp32_weight]["exp_avg_sq"]
    assert (state["exp_avg_sq"].float() / moment).mean().item() == pytest.approx(1, abs=0.03)
    assert all(values.element_size() == 2 for values in state.values())


def go_on(folder, steps: int, load: int, layout=(1, 1)):
    """Train a small model for ``steps`` on two ranks, from the checkpoint of iteration ``load`` if
    that is above 0, and save the last. Return this rank's tensors as a checkpoint has them."""
    config = settings(folder, layout, optimizer_precision="bf16", micro_batch_size=2, weight_decay=0.1)
    model = build_model(SHAPE, config, "lm")
    with torch.no_grad():
        for weight in model.parameters():
            # the same for a tied embedding's copies
            generator = torch.Generator().manual_seed(weight.numel())
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.05 + (weight.dim() == 1))
    trained = Learner(model, config, 1e-3, 100, 0)
    if load:
        format.load(StageFolder(folder).resolve(load), {"model": trained})
    for step in range(load, steps):
        rows = torch.randint(0, 300, (4, 16), generator=torch.Generator().manual_seed(step))
        share = shard(list(range(4)), groups.data_rank(), groups.data_ranks())
        trained.step(
            split({"tokens": rows[share], "response_mask": torch.ones(len(share), 16, dtype=torch.bool)}, 2),
            Objective(("loss",), sft.compute),
        )
    saver = Saver(StageFolder(folder), {"model": trained}, config)
    saver.save(steps, {"wall_seconds": 0.0})
    saver.wait()
    return {tensor.key: tensor.data.detach().clone() for tensor in held(trained)}


def test_a_tied_embedding_s_two_copies_stay_equal(tmp_path):
    """Weight and state are the same on the first and on the last pipeline stage. A checkpoint has
    one copy."""
    first, last = run(go_on, 1, 2, 1, tmp_path, 3, 0, (1, 2))
    names = [key for key in first if "word_embeddings" in key]
    assert len(names) == 4, names
    for name in names:
        assert first[name].any() and torch.equal(first[name], last[name]), name


def test_a_resumed_run_goes_on_bit_for_bit_and_other_layouts_load_it(tmp_path):
    straight = run(go_on, 1, 1, 2, tmp_path / "straight", 3, 0)
    run(go_on, 1, 1, 2, tmp_path / "resumed", 2, 0)
    resumed = run(go_on, 1, 1, 2, tmp_path / "resumed", 3, 2)
    for expected, tensors in zip(straight, resumed, strict=True):
        assert tensors.keys() == expected.keys()
        assert any(key.startswith("optimizer.state.remainder") for key in tensors)
        assert all(torch.equal(tensors[key], expected[key]) for key in tensors)
        assert any(values.any() for key, values in tensors.items() if "remainder" in key)

    def walk(layout, number):
        reloaded = learner(settings(tmp_path / "walk", layout, optimizer_precision="bf16"))
        if number > 1:
            format.load(StageFolder(tmp_path / "walk").resolve(), {"model": reloaded})
            assert wrong(reloaded, number - 1) == []
        fill(reloaded, number)
        saver = Saver(
            StageFolder(tmp_path / "walk"),
            {"model": reloaded},
            settings(tmp_path / "walk", layout, optimizer_precision="bf16"),
        )
        saver.save(number, {})
        saver.wait()

    for number, layout in enumerate(((1, 1, 2), (2, 1, 1), (1, 2, 1)), 1):
        run(walk, *layout, layout[:2], number)
