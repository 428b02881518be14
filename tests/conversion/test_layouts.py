"""From any shard layout to any other, and on after a kill."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from conversion import tensors, torch_dist, work
from conversion.tensors import BLOCK, Piece, Stored
from tests.bloom import tiny_bloom
from tests.conversion.folders import convert_to, export_from, save_model
from tests.distributed import run
from training import checksums
from training.config import ConfigError

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(("tensor", "pipeline"), [(2, 2), (1, 3)])
def test_what_megatron_core_saved_at_a_layout_comes_back_byte_for_byte(tmp_path, tensor, pipeline, monkeypatch):
    """megatron-core loads our checkpoint (a tensor in many chunks, as large ones are) at this layout and saves it itself, padded
    (301 rows to 512), split along both axes; 3 stages do not divide 4 layers."""
    monkeypatch.setattr(tensors, "BLOCK", 4096)
    tiny_bloom(tmp_path / "hf", hidden=48, heads=6, vocab=301)
    convert_to(tmp_path)
    described = torch_dist.metadata(tmp_path / "convert" / "checkpoints" / "iter_0000000" / "model").state_dict_metadata
    assert len(described["embedding.word_embeddings.weight"].chunks) > 10
    run(save_model, tensor, pipeline, 1, tmp_path, "sft", "lm", 0.0, tensor, pipeline)
    target = export_from(tmp_path, "sft", "sft")
    assert (target / "model.safetensors").read_bytes() == (tmp_path / "hf" / "model.safetensors").read_bytes()


def test_blocks_of_a_tensor_in_pieces_are_its_rows():
    """Blocks smaller than the tensor, pieces of a 2 x 2 grid, a part across all four, zero rows below."""
    whole = torch.arange(24.0).view(6, 4)
    grid = [Piece((row, column), whole[row : row + 3, column : column + 2]) for row in (0, 3) for column in (0, 2)]
    tensor = Stored((6, 4), torch.float32, tuple(grid))
    assert tensor.complete and torch.equal(tensor.load(), whole)
    assert torch.equal(tensor.part(0, 1, 4).part(1, 1, 2).load(), whole[1:5, 1:3])
    assert torch.equal(tensor.padded(8).load(), torch.cat((whole, torch.zeros(2, 4)))) and not tensor.padded(8).complete
    big = Stored.whole(torch.arange(BLOCK // 2, dtype=torch.float32).view(-1, 1024))
    blocks = list(big.blocks(torch.bfloat16))
    assert len(blocks) == 2 and torch.equal(torch.cat(blocks), big.load().bfloat16())


def content(folder: Path) -> dict[str, str]:
    return checksums.digests(folder, checksums.files(folder))


def test_a_killed_conversion_goes_on_and_leaves_the_same_bytes(tmp_path, monkeypatch):
    """kill -9 in the middle of the second of several files; the first is not written again, and nothing is left over."""
    tiny_bloom(tmp_path / "hf", hidden=256, layers=6, vocab=2000)
    (tmp_path / "sitecustomize.py").write_text("import conversion.torch_dist, conversion.work\n"
                                               "conversion.torch_dist.FILE_BYTES = 1 << 21\nconversion.work.THREADS = 1\n")
    slow = tmp_path / "slow"
    slow.mkdir()
    (slow / "sitecustomize.py").write_text((tmp_path / "sitecustomize.py").read_text() + "import time, torch\nsave = torch.save\n"
                                           "torch.save = lambda *given: (time.sleep(0.1), save(*given))\n")
    command = [sys.executable, "-m", "conversion.hf_to_megatron", str(tmp_path / "hf")]

    def start(output: str, where: Path) -> subprocess.Popen:
        return subprocess.Popen([*command, str(tmp_path / output)], cwd=ROOT, env={**os.environ, "PYTHONPATH": f"{where}:{ROOT}"})

    assert start("whole", tmp_path).wait() == 0
    killed = start("killed", slow)
    aside = tmp_path / "killed" / "checkpoints" / ".iter_0000000.converting"
    while len(list(aside.rglob("*.distcp"))) < 1 or not list(aside.rglob("*.part")):
        assert killed.poll() is None
        time.sleep(0.01)
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    first = aside / "model" / "__0_0.distcp"
    written = first.stat().st_mtime_ns
    assert not (tmp_path / "killed" / "latest").exists()
    assert start("killed", tmp_path).wait() == 0
    whole, resumed = (tmp_path / name / "checkpoints" / "iter_0000000" for name in ("whole", "killed"))
    assert (resumed / "model" / "__0_0.distcp").stat().st_mtime_ns == written
    assert len(list(resumed.rglob("*.distcp"))) > 2 and content(whole) == content(resumed)
    assert [path.name for path in (tmp_path / "killed" / "checkpoints").iterdir()] == ["iter_0000000"]


def test_what_was_begun_from_other_files_is_not_gone_on_with(tmp_path):
    aside = tmp_path / "aside"
    for source, kept in (("a", False), ("a", True), ("b", False)):
        with work.folder(aside, {"from": source}, 0):
            assert (aside / "old").exists() == kept
            (aside / "old").touch()
    shutil.rmtree(aside)


def test_files_hold_whole_tensors_and_a_key_has_one_type(monkeypatch):
    table = {entry.name: Stored.whole(torch.zeros(4)) for entry in torch_dist.entries(2)}
    monkeypatch.setattr(torch_dist, "FILE_BYTES", 80)
    files = torch_dist.plan(table, 2, "tied")
    assert [len(parts) for parts in files.values()] == [5, 5, 5, 5, 5, 4]
    with pytest.raises(ConfigError, match="h.1.mlp.dense_4h_to_h.bias is torch.float16, in layer 0 it is torch.float32"):
        torch_dist.plan(table | {"h.1.mlp.dense_4h_to_h.bias": Stored.whole(torch.zeros(4).half())}, 2, "tied")
