"""Layouts: how layers are divided, what is refused, and that checkpoints and heads do not depend on
the division."""

from types import SimpleNamespace

import pytest
import torch
from megatron.core import parallel_state

from conversion.config import ConvertConfig, ConvertPaths
from conversion.hf_to_megatron import convert
from tests.support.bloom import tiny_bloom
from tests.support.distributed import run
from tests.support.layouts import enter, settings
from training.checkpoint import format
from training.checkpoint.stage_folder import StageFolder
from training.checkpoint.writer import Saver
from training.config.schema import build
from training.config.shape import Shape
from training.config.trainers import PPOConfig, PPOPaths, RewardConfig
from training.errors import ConfigError
from training.models.bloom import table
from training.models.language_model import Interleaved, pipeline_layout
from training.sft import compute
from training.trainer.step import Learner, Objective, build_model, evaluate, split

BLOOM_7B1 = table.shape(30, 4096, 32, 250880, 1e-5)
SHAPES = {
    "560m": table.shape(24, 1024, 16, 250880, 1e-5),
    "1b1": table.shape(24, 1536, 16, 250880, 1e-5),
    "3b": table.shape(30, 2560, 32, 250880, 1e-5),
    "7b1": BLOOM_7B1,
    "176b": table.shape(70, 14336, 112, 250880, 1e-5),
}
PUBLISHED = {
    "560m": 559_214_592,
    "1b1": 1_065_314_304,
    "3b": 3_002_557_440,
    "7b1": 7_069_016_064,
    "176b": 176_247_271_424,
}


@pytest.mark.parametrize("size", SHAPES)
def test_parameters_are_those_of_the_published_models(size):
    assert SHAPES[size].parameters() == PUBLISHED[size]


def test_the_split_counts_the_output_matrix_and_leaves_the_first_stage_no_more_than_others():
    # the output matrix costs as much as 5.1 layers
    assert BLOOM_7B1.stage_layers(4) == [9, 9, 9, 3]
    assert BLOOM_7B1.stage_layers(4, "scalar") == [7, 8, 7, 8] or sorted(BLOOM_7B1.stage_layers(4, "scalar")) == [
        7,
        7,
        8,
        8,
    ]
    assert BLOOM_7B1.stage_layers(1) == [30]
    for shape in SHAPES.values():
        for stages in range(1, shape.layers + 1):
            for head, output in (("lm", shape.vocab / (12 * shape.hidden)), ("scalar", 0.0)):
                split_ = shape.stage_layers(stages, head)
                assert sum(split_) == shape.layers and min(split_) >= 1 and split_[0] <= max(split_)
                # no split is better than the mean
                bound = max((shape.layers + output) / stages + 1, 1 + output)
                assert max(*split_[:-1], split_[-1] + output, 0) <= bound + 1e-9 or stages == 1


def test_parts_of_an_interleaved_pipeline_hold_every_layer_once():
    assert BLOOM_7B1.chunk_layers(4, 2) == [[5, 4], [5, 4], [5, 4], [2, 1]]
    layout = pipeline_layout(BLOOM_7B1, SimpleNamespace(pipeline_parallel=4, virtual_pipeline=2), "lm")
    assert [part.count("decoder") for part in layout] == [5, 5, 5, 2, 4, 4, 4, 1], (
        "megatron-core's order: all stages' first parts first"
    )
    assert layout[0][0] == "embedding" and layout[-1][-1] == "loss"
    for stages, virtual in ((2, 2), (3, 5), (4, 7), (15, 2)):
        parts = BLOOM_7B1.chunk_layers(stages, virtual)
        assert sum(map(sum, parts)) == 30 and min(map(min, parts)) >= 1


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (
            (3, 1, 1),
            "tensor_parallel = 3 does not divide the model's 32 attention heads; choose one of 1, 2, 4, 8, 16, 32",
        ),
        ((1, 31, 1), "pipeline_parallel = 31 is more than the model's 30 layers; choose any from 1 to 30"),
        ((1, 1, 2), "virtual_pipeline = 2 needs pipeline_parallel > 1; set virtual_pipeline = 1"),
        (
            (1, 8, 4),
            "pipeline_parallel = 8 x virtual_pipeline = 4 makes 32 parts, which is more than the model's 30 layers; "
            "choose a virtual_pipeline from 1 to 3",
        ),
    ],
)
def test_a_layout_that_can_t_be_is_refused_with_those_that_can(layout, message):
    with pytest.raises(ConfigError, match=message):
        BLOOM_7B1.check_layout(*layout)
    for fine in ((1, 4, 1), (2, 4, 7), (32, 30, 1), (1, 15, 2)):
        BLOOM_7B1.check_layout(*fine)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"context_parallel": 2}, "sft.context_parallel = 2: attention is not divided along the sequence; set it to 1"),
        ({"virtual_pipeline": 2}, "sft.virtual_pipeline = 2 needs pipeline_parallel > 1"),
        ({"virtual_pipeline": 0}, "sft.virtual_pipeline = 0: expected at least 1"),
        ({"recompute": "mlp"}, "sft.recompute = 'mlp': expected one of none, selective, full"),
        ({"attention": "eager"}, "sft.attention = 'eager': expected one of auto, flash, te, flex, sdpa"),
    ],
)
def test_settings_that_contradict_are_refused_when_they_are_read(values, message):
    paths = dict.fromkeys(("output", "model", "init", "train", "heldout"), "")
    with pytest.raises(ConfigError, match=message):
        build(type(settings()), {"paths": paths, **values}, "sft")


def test_the_interleaved_schedule_needs_micro_batches_in_groups_of_the_stages():
    uneven = settings(pipeline=2, virtual=2, micro_batch_size=8)
    with pytest.raises(
        ConfigError,
        match="groups of pipeline_parallel = 2, but global_batch_size 8 / micro_batch_size 8 .* = 1; change",
    ):
        uneven.data_parallel(2)
    assert settings(pipeline=2, virtual=2, micro_batch_size=4).data_parallel(2) == 1


@pytest.fixture(scope="module")
def bloom(tmp_path_factory):
    """Five layers, six heads: (folder with hf/ and convert/, the Hugging Face model)."""
    folder = tmp_path_factory.mktemp("bloom")
    model = tiny_bloom(folder / "hf", heads=6, hidden=48, layers=5, vocab=300)
    run(convert, 1, 1, 1, ConvertConfig(paths=ConvertPaths(str(folder / "convert"), str(folder / "hf"))))
    return folder, model


def learn(folder, stage, config, steps: int, goes_on: bool) -> list[float]:
    """Losses of ``steps`` steps at the config's layout, from the stage's checkpoint if ``goes_on``;
    then the next checkpoint is saved."""
    enter(config.tensor_parallel, config.pipeline_parallel, config.virtual_pipeline)
    model = build_model(Shape.read(folder / "hf"), config, "lm")
    assert isinstance(model, Interleaved) == (config.virtual_pipeline > 1)
    format.load_weights(StageFolder(folder / "convert").resolve() / "model", model)
    learner, done = Learner(model, config, config.lr, 20, 0), 0
    if goes_on:
        done = format.load(StageFolder(stage).resolve(), {"model": learner})["iteration"]
    losses = []
    for step in range(done, done + steps):
        tokens = torch.randint(0, 300, (8, 16), generator=torch.Generator().manual_seed(step))
        rows = {"tokens": tokens, "response_mask": torch.arange(16).expand(8, 16) > 2}
        mine = split(rows, 8 // parallel_state.get_data_parallel_world_size())[parallel_state.get_data_parallel_rank()]
        losses.append(learner.step(split(mine, 2), Objective(("loss",), compute))["loss"])
    stage.mkdir(exist_ok=True)
    saver = Saver(StageFolder(stage), {"model": learner}, config)
    saver.save(done + steps, {})
    saver.wait()
    return losses


def test_a_checkpoint_of_an_uneven_interleaved_pipeline_goes_on_at_any_layout(bloom, tmp_path):
    """Weights and optimizer: 2 steps each at PP 2 with 2 parts a stage (3 + 1, 1 layers), TP 2, one
    rank, PP 2; one rank throughout."""
    folder, _ = bloom
    alone = run(learn, 1, 1, 1, folder, tmp_path / "alone", settings(), 8, False)[0]
    losses = []
    for layout in ((1, 2, 2), (2, 1, 1), (1, 1, 1), (1, 2, 1)):
        config = settings(*layout)
        losses += run(learn, 1, 1, layout[0] * layout[1], folder, tmp_path / "moved", config, 2, bool(losses))[0]
    assert losses == pytest.approx(alone, rel=1e-5)


def interleaved(folder):
    """A fresh scalar head's values from a pipeline of two stages of two parts."""
    enter(1, 2, 2)
    scalar = build_model(Shape.read(folder / "hf"), settings(pipeline=2, virtual=2), "scalar")
    format.load_weights(StageFolder(folder / "convert").resolve() / "model", scalar, fresh_head=5)
    # 3 rows in micro-batches of 1: filled up to 4, a multiple of the stages
    tokens = torch.arange(48).view(3, 16)
    return evaluate(scalar, {"tokens": tokens}, 1, lambda values, micro: values)


def test_an_interleaved_pipeline_scores_like_one_rank(bloom):
    folder, _ = bloom

    def alone():
        scalar = build_model(Shape.read(folder / "hf"), settings(), "scalar")
        format.load_weights(StageFolder(folder / "convert").resolve() / "model", scalar, fresh_head=5)
        return evaluate(scalar, {"tokens": torch.arange(48).view(3, 16)}, 3, lambda values, micro: values)

    (values,) = run(alone, 1, 1, 1)
    for scores in run(interleaved, 1, 1, 2, folder):
        assert torch.allclose(scores, values, atol=1e-5)


def test_every_trainer_takes_the_new_layouts():
    paths = ("",) * 5
    assert (
        RewardConfig(
            paths=settings().paths, pipeline_parallel=2, virtual_pipeline=2, recompute="selective"
        ).data_parallel(2)
        == 1
    )
    assert PPOConfig(paths=PPOPaths(*paths, ""), pipeline_parallel=4, recompute="full").data_parallel(4) == 1
