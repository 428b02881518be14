"""Where parts of PPO and GRPO meet: passes over the samples, the models that are asked, equal
samples."""

import json

import pytest
import torch

from tests.support.distributed import run
from training import grpo, ppo
from training.rl.experience import at_work, score
from training.rl.minibatches import epochs, plan


def rows(stage):
    return [json.loads(line) for line in (stage / "metrics.jsonl").read_text().splitlines()]


def minibatches(config) -> list[list[set[int]]]:
    """The samples of each minibatch of each pass, of one rank."""
    trainer = ppo.PPO(config)
    passes = epochs(config, trainer.shape, [12 + number for number in range(16)], 3)
    return [[{sample for row in layout.rows for sample in row} for layout in rows.minibatches] for rows in passes]


@pytest.mark.parametrize("tokens", [0, 150])
def test_each_later_pass_has_minibatches_of_its_own(small_run, tmp_path, tokens):
    config = small_run.ppo(tmp_path, epochs=3, micro_batch_tokens=tokens, prompt_length=40, response_length=8)
    first, second, third = run(minibatches, 1, 1, 1, config)[0]
    assert first == [set(range(8)), set(range(8, 16))], (
        "the first in the samples' order: a minibatch of GRPO has whole groups"
    )
    assert all(sorted(sum(map(sorted, one), [])) == list(range(16)) for one in (second, third))
    assert first != second != third != first
    assert run(minibatches, 1, 1, 1, config)[0] == [first, second, third], "a resumed run's are the same"


@pytest.mark.parametrize(
    ("trainer", "values"),
    [("ppo", {}), ("ppo", {"lora_rank": 2}), ("grpo", {"kl_in": "reward"}), ("grpo", {"offload": "all"})],
)
def test_without_a_kl_penalty_there_is_no_reference(small_run, tmp_path, trainer, values):
    """Neither in memory nor in the numbers, and the gates do without."""
    config = getattr(small_run, trainer)(tmp_path, iterations=2, kl_coef=0.0, eval_every=1, gate_after=0, **values)
    module, kind = {"ppo": (ppo, ppo.PPO), "grpo": (grpo, grpo.GRPO)}[trainer]
    assert run(lambda: kind(config).models.reference, 1, 1, 1)[0] is None
    run(module.run, 1, 1, 1, config)
    for row in rows(tmp_path):
        assert not [name for name in row if "kl" in name and name not in ("kl_coef", "approx_kl")]
        assert row["reward"] != 0 and row["heldout_reward"] != 0 and row["gates_breached"] == 0


def asked(config) -> dict[str, int]:
    """Forward passes of each model during one evaluation on the held-out prompts."""
    trainer = ppo.PPO(config)
    counts = dict.fromkeys(("policy", "reference", "reward", "value"), 0)

    def count(name):
        def seen(*_):
            counts[name] += 1

        return seen

    for name in counts:
        with at_work(getattr(trainer.models, name)) as model:
            model.decoder.layers[0].register_forward_hook(count(name))
    trainer.heldout(1)
    return counts


def test_an_evaluation_does_not_ask_the_value_model(small_run, tmp_path):
    counts = run(asked, 1, 1, 1, small_run.ppo(tmp_path))[0]
    assert counts["value"] == 0 and counts["reward"] == counts["reference"] > 0


def collapsed(config) -> tuple[torch.Tensor, torch.Tensor]:
    """(Tokens, scores) by a reward model that rounds a sample otherwise at each place, as a GPU's
    kernels in bf16 do."""
    trainer, generator = grpo.GRPO(config), torch.Generator().manual_seed(0)
    trainer.models.reward.register_forward_hook(
        lambda *given: given[-1] + 1e-2 * torch.rand(given[-1].shape, generator=generator)
    )
    batch = trainer.sample([number // config.group_size for number in range(16)], trainer.rows, 1).batch
    return batch["tokens"], score(
        config, trainer.models, batch, plan(config, trainer.shape, batch["lengths"].tolist(), 8)
    ).scores


def test_equal_samples_of_a_group_score_the_same(small_run, tmp_path):
    """A policy that has collapsed: at this temperature all samples of a prompt are one, and their
    advantages would be made of noise."""
    config = small_run.grpo(tmp_path, iterations=1, temperature=1e-6, response_length=7, micro_batch_tokens=200)
    tokens, scores = (values.view(4, 4, -1) for values in run(collapsed, 1, 1, 1, config)[0])
    assert torch.equal(tokens, tokens[:, :1].expand_as(tokens)) and torch.equal(scores, scores[:, :1].expand_as(scores))
    assert len(scores[:, 0].unique()) == 4


def test_one_rank_says_that_nothing_is_left_to_do(small_run, tmp_path, capfd):
    for _ in range(2):
        run(ppo.run, 2, 1, 1, small_run.ppo(tmp_path, layout=(2, 1), iterations=1))
    assert capfd.readouterr().out.count("nothing left to do: iteration 1 of 1 is saved") == 1
