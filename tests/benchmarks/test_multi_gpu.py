"""Several ranks without GPUs: benchmarks/multi_gpu/run.sh's parts on gloo, its plan, and layers of
tensor parallelism as one graph."""

import json
import math
import re
import time

import pytest
import torch
from megatron.core.transformer.transformer_layer import TransformerLayer

from benchmarks.multi_gpu import checks, common, plan, speed, suite
from benchmarks.multi_gpu.plan import Job, fitting, layout, waves
from benchmarks.multi_gpu.tables import tables
from launcher.estimates import iteration_time
from tests.support.distributed import run
from training.config import cost
from training.data.packing import RowLimits, lay_out
from training.models.bloom.table import shape as bloom
from training.trainer.step import build_model

CARD = {"name": "H100", "count": 8, "memory_gb": 85.5, "memory_gb_s": 3350}


def said(capfd) -> list[dict]:
    return [json.loads(line) for line in capfd.readouterr().out.splitlines() if line.startswith("{")]


def test_every_part_runs_on_gloo_and_finds_layouts_equal(tmp_path, capfd, monkeypatch):
    monkeypatch.setitem(common.SHAPES, "tiny", bloom(4, 32, 4, 300, 1e-5))
    monkeypatch.setattr(common, "length", lambda size: 32)
    batch = {"micro_batch_size": 1, "global_batch_size": 4}
    run(checks.gradients, 1, 1, 1, "tiny", layout(), tmp_path)
    run(checks.gradients, 2, 2, 1, "tiny", layout(2, 2), tmp_path)
    run(checks.gradients, 1, 1, 2, "tiny", layout(), tmp_path)
    run(speed.warm, 2, 1, 1, "tiny", layout(2, micro_batch_size=1, recompute="none", seq_length=32), tmp_path)
    run(speed.steps, 1, 2, 1, "tiny", layout(1, 2, **batch), tmp_path)
    run(speed.prepared, 1, 1, 1, "tiny", layout(), tmp_path)
    run(speed.phases, 1, 2, 1, "tiny", layout(1, 2, generation_tensor_parallel=2), tmp_path)
    run(checks.saved, 2, 1, 1, "tiny", layout(2), tmp_path)
    run(checks.loaded, 1, 1, 1, "tiny", layout(), tmp_path)
    found = said(capfd)
    assert [row["part"] for row in found] == [
        *["gradients"] * 3,
        "warm",
        "sft",
        "reshard",
        "reshard",
        "prepared",
        "ppo warms up",
        "ppo warms up",
        "ppo",
        "saved",
        "loaded",
    ]
    assert all(row["ok"] for row in found), found
    assert found[1]["worst"] < 5e-6 and found[2]["worst"] < 5e-6 and found[-1]["tensors"] == 4 * 17
    # From PP 2 to TP 1 a rank receives what it has not, and the round's larger message is what its
    # link carries.
    alone = next(row for row in found if row["part"] == "reshard")
    assert alone["generation"] == 1 and alone["memory_gb"] > 3 * alone["gb"] and alone["link_gb"] >= alone["gb"] > 0
    # A gradient or an element that is off is seen.
    kept = torch.load(tmp_path / "tiny.pt")
    kept["gradients"]["decoder.layers.2.mlp.linear_fc2.weight"][0] *= 1.05
    torch.save(kept, tmp_path / "tiny.pt")
    prints = json.loads((tmp_path / "fingerprints.json").read_text())
    prints["decoder.layers.mlp.linear_fc1.bias"] += 1
    (tmp_path / "fingerprints.json").write_text(json.dumps(prints))
    run(checks.gradients, 1, 1, 2, "tiny", layout(), tmp_path)
    run(checks.loaded, 1, 1, 1, "tiny", layout(), tmp_path)
    gradients, loaded = said(capfd)
    assert not gradients["ok"] and gradients["of"] == "decoder.layers.2.mlp.linear_fc2.weight"
    assert loaded["wrong"] == ["decoder.layers.mlp.linear_fc1.bias"]


def test_a_layout_that_fails_costs_itself_only(tmp_path):
    job = Job("one", "gradients", "tiny", [0], [layout(3), layout()], 100)
    running = suite.Running(job, tmp_path, tmp_path, cpu=True)
    running.run(math.inf)
    failed, fine = running.rows
    assert "3" in failed["error"] and failed["layout"] == layout(3)
    assert fine["ok"] and fine["layout"] == layout()
    assert "one, TP 3" in tables(running.rows, CARD)


def test_a_rank_that_fails_alone_is_heard(tmp_path):
    running = suite.Running(Job("fails", "fails", "tiny", [0, 1], [layout()], 60), tmp_path, tmp_path, cpu=True)
    running.run(math.inf)
    (row,) = running.rows
    assert row["ok"] and "RuntimeError: this rank fails alone on purpose" in row["said"]


def test_a_job_whose_time_is_over_says_where_each_rank_is(tmp_path, monkeypatch):
    monkeypatch.setattr(suite, "STACKS_S", 1)
    running = suite.Running(Job("late", "gradients", "tiny", [0], [layout()], 2), tmp_path, tmp_path, cpu=True)
    log = tmp_path / "late.log"
    while "all imported" not in log.read_text():
        time.sleep(0.05)
    running.go = tmp_path / "never"  # the rank waits without end
    running.run(math.inf)
    assert running.rows[0]["error"] == "its time was over"
    assert "rank.py" in log.read_text()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("0 --tiny", "--gpus 0: expected a power of two"),
        ("2 --tiny --only (", "'\\(' is no regular expression"),
        ("2 --tiny --only zzzz", "no job of --parts .* on 2 GPUs has a name that --only zzzz matches"),
        ("1 --tiny --parts large", "no job of --parts large on 1 GPUs"),
    ],
)
def test_what_cannot_be_run_is_said_before_anything_is(words, says, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["multi_gpu.py", "--gpus", *words.split()])
    with pytest.raises(SystemExit) as ended:
        suite.main()
    assert ended.value.code == 2 and re.search(says, capsys.readouterr().err) and not list(tmp_path.iterdir())


def test_a_full_disk_ends_nothing(tmp_path, capsys):
    rows = suite.write([], CARD, tmp_path / "missing")
    assert rows == [] and "missing/multi_gpu.json could not be written" in capsys.readouterr().err


@pytest.mark.parametrize("gpus", [1, 2, 4, 8])
def test_what_is_timed_shares_no_gpu(gpus):
    planned = waves(gpus, False, CARD, list(plan.PARTS))
    for wave in planned:
        used = [gpu for job in wave for gpu in job.gpus]
        assert max(used) < gpus
        assert len(used) == len(set(used)) or {job.part for job in wave} <= {"gradients", "fails", "prepared", "warm"}
        for job in wave:
            for values in job.layouts:
                ranks = values["tensor_parallel"] * values["pipeline_parallel"]
                assert len(job.gpus) % ranks == 0, (job.name, values)
    order = [job.part for wave in planned for job in wave]
    assert order.index("prepared") < order.index("ppo") and order.index("saved") < order.index("loaded")


@pytest.mark.parametrize(("values", "rows"), [(layout(2, 2), 32), (layout(1, 2), 11), (layout(), 16)])
def test_what_ppo_is_reckoned_with_is_what_it_runs(values, rows):
    """Rows of a micro-batch by the model, and by the trainer's packing, for replies of full length
    on four H100. Three times 11 rows: one is empty, and the bubble is shorter than with twice
    16."""
    config, shape = plan.ppo_config("1b7", values), plan.SHAPES["1b7"]
    data = config.data_parallel(4)
    assert iteration_time.iteration(shape, config, 4, plan.machine(CARD), 4).micro_batch == (rows, 512)
    least = cost.launched_tokens(shape, config.tensor_parallel, 512, cost.PEAK_TFLOPS[9])
    limits = RowLimits(512, 128, data, config.micro_batch_tokens // 512, config.pipeline_parallel, min_tokens=least)
    assert lay_out([512] * 64, limits)[1:] == (512, rows)


def test_single_jobs_and_layouts_can_be_chosen():
    only = ["560m, PP 2 x DP 2", "ppo 1", "sft 2.*not compiled"]
    found = {job.name: len(job.layouts) for wave in waves(4, False, CARD, list(plan.PARTS), only) for job in wave}
    assert found == {"one GPU 560m": 1, "prepare 1b7": 1, "gradients 560m": 1, "warm 0": 1, "ppo 1": 1, "sft 2, 2": 1}


def test_what_does_not_fit_is_left_out_and_the_fastest_that_fits_is_taken():
    assert fitting("7b1", layout(), 1, CARD) is None
    assert fitting("7b1", layout(), 4, CARD)["micro_batch_size"] == 2
    pipeline = fitting("7b1", layout(1, 4), 4, CARD)
    assert (pipeline["micro_batch_size"], pipeline["recompute"]) == (1, "none"), "fewer rows, a smaller bubble"


def one_graph(sequence_parallel: bool) -> tuple[int, list[float]]:
    """Graphs of a layer at TP 2, compiled, and how far its results and gradients are from the
    uncompiled layer's."""
    shape = bloom(2, 64, 4, 300, 1e-5)
    model = build_model(shape, common.settings("tiny", tensor_parallel=2, sequence_parallel=sequence_parallel), "lm")
    common.fill(model, shape)
    layer, graphs, found = model.decoder.layers[0], [], []
    layer.self_attention.core_attention.slopes = (
        None  # SDPA reads them on the host, which only the CPU's attention does
    )
    torch.manual_seed(3 + sequence_parallel * torch.distributed.get_rank())
    hidden = torch.randn(16 if sequence_parallel else 32, 1, 64, requires_grad=True)

    def backend(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.backends.debugging.aot_eager(graph, inputs)

    def measured(forward):
        layer.zero_grad()
        output = forward(layer, hidden_states=hidden, attention_mask=None)[0]
        found.append([output.detach(), *torch.autograd.grad(output.square().sum(), [hidden, *layer.parameters()])])

    measured(TransformerLayer.forward)
    with torch.compiler.set_stance("default"), torch._C.DisableTorchFunction():
        measured(torch.compile(TransformerLayer.forward, fullgraph=True, backend=backend))
    return len(graphs), [(ours - theirs).abs().max().item() for ours, theirs in zip(*found, strict=True)]


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_a_layer_with_messages_between_ranks_is_one_graph(sequence_parallel):
    for graphs, errors in run(one_graph, 2, 1, 1, sequence_parallel):
        assert graphs == 1 and max(errors) < 1e-5
