"""What goes wrong with megatron-core 0.16.1 without an error; the pitfalls that the parity and
resume tests do not name."""

import configparser
import multiprocessing
from pathlib import Path

import pytest
import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.transformer.transformer_config import TransformerConfig

from tests.support.distributed import run
from training.checkpoint import format
from training.checkpoint.stage_folder import StageFolder
from training.config.shape import Shape
from training.config.trainers import PPOConfig
from training.distributed import cpu_backend
from training.trainer.step import Learner, build_model

ROOT = Path(__file__).parents[3]


def test_the_cpu_shim_restores_everything():
    names = [
        "current_device",
        "synchronize",
        "manual_seed",
        "get_rng_state",
        "set_rng_state",
        "Stream",
        "Event",
        "stream",
    ]
    before = [getattr(torch.cuda, name) for name in names]
    with cpu_backend.mcore_on_cpu():
        assert torch.cuda.current_device() == torch.device("cpu")
        assert torch.zeros(1, device="cuda").device.type == "cpu" and torch.zeros(1).cuda().device.type == "cpu"
        assert torch.zeros(1).type() == "torch.cuda.FloatTensor"
    assert [getattr(torch.cuda, name) for name in names] == before
    assert torch.zeros(1).type() == "torch.FloatTensor"


def test_the_cpu_shim_is_refused_where_cuda_exists(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(RuntimeError, match="machine with CUDA"), cpu_backend.mcore_on_cpu():
        pass


def draw():
    """A number from the tensor-parallel generator and one from the default generator."""
    with tensor_parallel.get_cuda_rng_tracker().fork():
        forked = torch.rand(1).item()
    return parallel_state.get_tensor_model_parallel_rank(), forked, torch.rand(1).item()


def test_seeds_take_effect_on_the_cpu():
    """Without CUDA torch.cuda.manual_seed is queued without end: ranks would silently share, or not
    share, their randomness."""
    first, again = run(draw, 2, 1, 2), run(draw, 2, 1, 2)
    assert first == again
    by_rank = {rank: {forked for r, forked, _ in first if r == rank} for rank in (0, 1)}
    # differs over TP, equal over DP
    assert len(by_rank[0]) == len(by_rank[1]) == 1 and by_rank[0] != by_rank[1]
    assert len({default for *_, default in first}) == 1


def parameters(folder, settings):
    model = build_model(Shape.read(folder), settings, "lm")
    shards = {name for name, p in model.named_parameters() if getattr(p, "tensor_model_parallel", False)}
    replicated_in_region = {name for name, p in model.named_parameters() if getattr(p, "sequence_parallel", False)}
    return {name for name, _ in model.named_parameters()}, shards, replicated_in_region


def test_every_parameter_says_how_it_is_split(small_run, tmp_path):
    """Gradient norms count a shard as a copy, and sequence parallelism skips a reduction, where a
    flag is missing."""
    settings = small_run.sft(tmp_path, layout=(2, 1), sequence_parallel=True)
    for names, shards, replicated in run(parameters, 2, 1, 1, small_run.model, settings):
        split = {
            name
            for name in names
            if any(part in name for part in ("word_embeddings", "linear_qkv", "linear_fc1"))
            or name.endswith(("linear_proj.weight", "linear_fc2.weight"))
        }
        assert shards == split
        assert replicated == names - split


def decay(folder, settings):
    model = build_model(Shape.read(folder), settings, "lm")
    format.load_weights(StageFolder(settings.paths.init).resolve() / "model", model)
    learner = Learner(model, settings, settings.lr, settings.iterations, settings.warmup_iterations)
    rates = []
    for _ in range(settings.iterations):
        learner.schedule.step(1)
        rates.append(learner.optimizer.param_groups[0]["lr"])
    return {group["wd_mult"]: group["weight_decay"] for group in learner.optimizer.param_groups}, rates


def test_biases_and_norms_do_not_decay_and_the_schedule_ends_near_zero(small_run, tmp_path):
    """megatron-core's optimizer applies the exclusion only through its scheduler; and no step may
    run at rate 0."""
    settings = small_run.sft(tmp_path, iterations=10, weight_decay=0.1, warmup_iterations=2, lr=1.0, schedule="linear")
    ((groups, rates),) = run(decay, 1, 1, 1, small_run.model, settings)
    assert groups == {1.0: 0.1, 0.0: 0.0}
    assert rates[:2] == pytest.approx([0.5, 1.0]) and max(rates) == 1.0
    # after 8 more ticks 1/9 is left: never 0
    assert rates[2:] == pytest.approx([1 - step / 9 for step in range(1, 9)])


def test_the_fused_flags_that_change_the_gelu_formula_are_off(small_run, tmp_path):
    from training.models.language_model import transformer_config

    def flags():
        config = transformer_config(Shape.read(small_run.model), small_run.sft(tmp_path))
        assert isinstance(config, TransformerConfig)
        return (
            config.bias_activation_fusion,
            config.activation_func.keywords,
            config.hidden_dropout,
            config.attention_dropout,
        )

    assert run(flags, 1, 1, 1) == [(False, {"approximate": "tanh"}, 0.0, 0.0)]


def test_saving_starts_no_helper_that_outlives_it(small_run, tmp_path):
    """megatron-core's first save spawns a manager process a rank, which a kill leaves behind."""

    def save(settings: PPOConfig):
        from training import sft

        sft.run(settings)
        return [process.name for process in multiprocessing.active_children()]

    assert run(save, 1, 1, 1, small_run.sft(tmp_path, iterations=1)) == [[]]


def test_undeclared_needs_of_megatron_core_are_declared_by_us():
    """Without psutil a checkpoint's writer dies and the save hangs without end."""
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    assert {"psutil", "einops", "packaging"} <= set(parser["options"]["install_requires"].split())
