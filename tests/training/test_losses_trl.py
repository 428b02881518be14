"""losses.py beside the functions of TRL 0.11.4, whose trainers have them all as methods; skipped
where it is not installed."""

import sys
from functools import partial
from types import ModuleType, SimpleNamespace

import pytest
import torch

from training import losses

NEEDS = "needs trl 0.11.4 with datasets 3.6.0 and tyro 0.9, installed beside our pins: make peers"
core = pytest.importorskip("trl.core", reason=NEEDS)
if not hasattr(core, "masked_whiten"):
    pytest.skip(NEEDS, allow_module_level=True)
try:
    PPOTrainer = pytest.importorskip("trl.trainer.ppo_trainer", reason=NEEDS, exc_type=ImportError).PPOTrainer
    trl_utils = pytest.importorskip("trl.trainer.utils", reason=NEEDS, exc_type=ImportError)
except RuntimeError:  # how TRL's lazy modules say that something of theirs is missing
    pytest.skip(NEEDS, allow_module_level=True)

CONFIG = SimpleNamespace(
    gamma=0.97,
    lam=0.9,
    whiten_rewards=False,
    cliprange=0.2,
    cliprange_value=0.3,
    vf_coef=0.0,
    ratio_threshold=1e9,
    kl_penalty="kl",
)
"""What TRL's methods read of ``self.config``."""


@pytest.fixture
def case():
    """Right-padded responses (4, 9): mask, and a new random tensor of the shape at each call."""
    generator = torch.Generator().manual_seed(5)
    mask = torch.arange(9)[None] < torch.tensor([[9], [4], [1], [7]])
    return mask, lambda: torch.randn(4, 9, generator=generator)


def test_gae_and_whitening(case):
    """TRL divides the squares by n - 1, we by n: the same except for that factor."""
    mask, draw = case
    rewards, values = draw() * mask, draw()
    _, theirs, returns = PPOTrainer.compute_advantages(SimpleNamespace(config=CONFIG), values, rewards, mask.float())
    advantages, our_returns = losses.gae(rewards, values, mask, CONFIG.gamma, CONFIG.lam)
    assert torch.allclose(our_returns[mask], returns[mask], atol=1e-6)
    chosen = advantages[mask]
    white = losses.whiten(advantages, chosen.mean(), chosen.var(correction=0), mask)
    unbiased = ((mask.sum() - 1) / mask.sum()).sqrt()
    assert torch.allclose((white * unbiased)[mask], theirs[mask], atol=1e-5)


def test_clipped_losses(case):
    mask, draw = case
    old, old_values, advantages, returns = draw(), draw(), draw(), draw()
    new, values = old + 0.3 * draw(), old_values + 0.5 * draw()
    theirs = PPOTrainer.loss(
        SimpleNamespace(config=CONFIG),
        old,
        old_values,
        torch.zeros(4, 9, 2),
        values,
        new,
        mask.float(),
        advantages,
        returns,
    )
    stats = theirs[-1]
    count = mask.sum()
    loss, clipped, _ = losses.policy_loss(new, old, advantages, mask, CONFIG.cliprange)
    assert loss.item() / count == pytest.approx(stats["loss/policy"].item(), rel=1e-5)
    assert clipped.item() / count == pytest.approx(stats["policy/clipfrac"].item(), rel=1e-5) and clipped > 0
    ours = losses.value_loss(values, old_values, returns, mask, CONFIG.cliprange_value)
    assert ours.item() / count == pytest.approx(stats["loss/value"].item(), rel=1e-5)


def test_kl_penalty(case):
    _, draw = case
    p, q = draw(), draw()
    assert torch.equal(losses.kl_k1(p, q), PPOTrainer._kl_penalty(SimpleNamespace(config=CONFIG), p, q))


def test_adaptive_controller():
    theirs, ours = trl_utils.AdaptiveKLController(0.2, 6.0, 1000), 0.2
    for kl in (1.0, 5.5, 6.5, 80.0, 6.0, 0.0):
        theirs.update(kl, 64)
        ours = losses.adaptive_kl_coef(ours, kl, 6.0, 64, 1000)
        assert ours == pytest.approx(theirs.value)


def test_reward_loss():
    """TRL's trainer knows pairs: chosen and rejected; ours any K."""
    from trl.trainer.reward_trainer import RewardTrainer

    rewards = torch.randn(6, 2, generator=torch.Generator().manual_seed(6))

    def model(input_ids, **_):
        return {"logits": input_ids}

    inputs = {
        f"{name}_{side}": rewards[:, i : i + 1]
        for i, side in enumerate(("chosen", "rejected"))
        for name in ("input_ids",)
    }
    inputs |= {f"attention_mask_{side}": torch.ones(6, 1) for side in ("chosen", "rejected")}
    trainer = SimpleNamespace(use_reward_data_collator=True, args=SimpleNamespace(center_rewards_coefficient=None))
    theirs = RewardTrainer.compute_loss(trainer, model, inputs)
    ours = losses.pairwise_loss(rewards, torch.tensor([[1.0, 0.0]]).expand(6, 2))[0].mean()
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)


@pytest.mark.parametrize(("kind", "smoothing"), [("sigmoid", 0.0), ("sigmoid", 0.2), ("ipo", 0.0)])
def test_dpo_losses(monkeypatch, kind, smoothing):
    """TRL's module asks for a name that transformers 5 has dropped, and takes llm_blender for
    installed."""
    monkeypatch.setattr(
        "transformers.models.auto.modeling_auto.MODEL_FOR_VISION_2_SEQ_MAPPING_NAMES", {}, raising=False
    )
    monkeypatch.setitem(sys.modules, "llm_blender", ModuleType("llm_blender"))
    from trl.trainer.dpo_trainer import DPOTrainer

    generator = torch.Generator().manual_seed(7)
    chosen, rejected, ref_chosen, ref_rejected = 3 * torch.randn(4, 9, generator=generator)
    trainer = SimpleNamespace(
        accelerator=SimpleNamespace(device="cpu"),
        reference_free=False,
        f_divergence_type="reverse_kl",
        beta=0.3,
        label_smoothing=smoothing,
        loss_type=kind,
    )
    theirs, chosen_rewards, rejected_rewards = DPOTrainer.dpo_loss(trainer, chosen, rejected, ref_chosen, ref_rejected)
    rewards = 0.3 * torch.stack((chosen - ref_chosen, rejected - ref_rejected), 1)
    pair_loss = (
        partial(losses.ipo_loss, beta=0.3)
        if kind == "ipo"
        else partial(losses.logistic_loss, label_smoothing=smoothing)
    )
    ours, _, margin, _ = losses.pairwise_loss(rewards, torch.tensor([[1.0, 0.0]]).expand(9, 2), pair_loss)
    assert torch.allclose(ours, theirs, rtol=1e-5) and torch.allclose(
        margin, chosen_rewards - rejected_rewards, atol=1e-6
    )
