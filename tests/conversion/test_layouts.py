"""From any shard layout to any other, and on after a kill."""

import hashlib
import json
import multiprocessing
import os
import resource
import shutil
import signal
import sys
import threading
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from conversion import command, hf_to_megatron, megatron_to_hf, tensors, torch_dist, work
from conversion.config import ConvertConfig, ConvertPaths, ExportConfig
from conversion.hf_to_megatron import convert
from conversion.tensors import BLOCK, Piece, Stored
from tests.conversion.folders import convert_to, export_from, save_model, sparse_bloom
from tests.support.bloom import tiny_bloom
from tests.support.distributed import run
from training.checkpoint import checksums
from training.errors import ConfigError
from training.models.bloom import table as bloom


@pytest.mark.parametrize(("tensor", "pipeline"), [(2, 2), (1, 3)])
def test_what_megatron_core_saved_at_a_layout_comes_back_byte_for_byte(tmp_path, tensor, pipeline, monkeypatch):
    """megatron-core loads our checkpoint (a tensor in many chunks, as large ones are) at this
    layout and saves it itself, padded (301 rows to 512), split along both axes; 3 stages do not
    divide 4 layers."""
    monkeypatch.setattr(tensors, "BLOCK", 4096)
    tiny_bloom(tmp_path / "hf", hidden=48, heads=6, vocab=301)
    convert_to(tmp_path)
    described = torch_dist.metadata(tmp_path / "convert" / "checkpoints" / "iter_0000000" / "model").state_dict_metadata
    assert len(described["embedding.word_embeddings.weight"].chunks) > 10
    run(save_model, tensor, pipeline, 1, tmp_path, "sft", "lm", 0.0, tensor, pipeline)
    target = export_from(tmp_path, "sft", "sft")
    assert (target / "model.safetensors").read_bytes() == (tmp_path / "hf" / "model.safetensors").read_bytes()


def test_blocks_of_a_tensor_in_pieces_are_its_rows():
    """Blocks smaller than the tensor, pieces of a 2 x 2 grid, a part across all four, zero rows
    below."""
    whole = torch.arange(24.0).view(6, 4)
    grid = [Piece((row, column), whole[row : row + 3, column : column + 2]) for row in (0, 3) for column in (0, 2)]
    tensor = Stored((6, 4), torch.float32, tuple(grid))
    assert tensor.complete and torch.equal(tensor.load(), whole)
    assert torch.equal(tensor.part(0, 1, 4).part(1, 1, 2).load(), whole[1:5, 1:3])
    assert torch.equal(tensor.padded(8).load(), torch.cat((whole, torch.zeros(2, 4)))) and not tensor.padded(8).complete
    big = Stored.of_tensor(torch.arange(BLOCK // 2, dtype=torch.float32).view(-1, 1024))
    blocks = list(big.blocks(torch.bfloat16))
    assert len(blocks) == 2 and torch.equal(torch.cat(blocks), big.load().bfloat16())


def content(folder: Path) -> dict[str, str]:
    return checksums.digests(folder, checksums.files(folder))


def test_a_killed_conversion_goes_on_and_leaves_the_same_bytes(tmp_path, monkeypatch):
    """kill -9 in the middle of the second of several files; the first is not written again, and
    nothing is left over."""
    tiny_bloom(tmp_path / "hf", hidden=256, layers=6, vocab=2000)
    monkeypatch.setattr(torch_dist, "FILE_BYTES", 1 << 21)
    whole, killed = (
        ConvertConfig(paths=ConvertPaths(str(tmp_path / name), str(tmp_path / "hf"))) for name in ("whole", "killed")
    )
    convert(whole)
    save = torch.save
    with monkeypatch.context() as slowly:
        slowly.setattr(torch, "save", lambda *given: (time.sleep(0.05), save(*given)))
        process = multiprocessing.get_context("fork").Process(target=convert, args=(killed,))
        process.start()
    aside = tmp_path / "killed" / "checkpoints" / ".iter_0000000.converting"
    while not list(aside.rglob("*.distcp")) or not list(aside.rglob("*.part")):
        assert process.is_alive()
        time.sleep(0.002)
    process.kill()
    process.join()
    first = next(aside.rglob("*.distcp"))
    written = first.stat().st_mtime_ns
    assert not (tmp_path / "killed" / "latest").exists()
    convert(killed)
    ended, resumed = (tmp_path / name / "checkpoints" / "iter_0000000" for name in ("whole", "killed"))
    assert (resumed / "model" / first.name).stat().st_mtime_ns == written
    assert len(list(resumed.rglob("*.distcp"))) > 2 and content(ended) == content(resumed)
    assert [path.name for path in (tmp_path / "killed" / "checkpoints").iterdir()] == ["iter_0000000"]


def test_a_full_disk_in_the_middle_of_an_export(tmp_path, monkeypatch, capsys):
    """No file may grow beyond 50 kB: exit code 74, the old folder stays. The next start keeps the
    first file and ends with all."""
    tiny_bloom(tmp_path / "hf", layers=2, vocab=100)
    convert_to(tmp_path)
    old = (export_from(tmp_path) / "model.safetensors").read_bytes()
    target, source = tmp_path / "export" / "sft", str(tmp_path / "convert")
    given = [source, str(target), "--model", str(tmp_path / "hf"), "--max-shard-gb", "3e-5", "--overwrite"]
    monkeypatch.setattr(sys, "argv", ["megatron_to_hf", *given])
    monkeypatch.setenv("CONVOY_WORDS", str(tmp_path / "errors"))

    def start() -> int:
        return command.main(ExportConfig, megatron_to_hf.run, megatron_to_hf.arguments(), lambda parsed: parsed)

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        assert start() == os.EX_IOERR
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "File too large; what is written is kept: run the same again to go on" in capsys.readouterr().err
    assert '"class": "disk full"' in (tmp_path / "errors/rank_0.json").read_text()
    assert (target / "model.safetensors").read_bytes() == old
    first = next((tmp_path / "export" / ".sft.converting").glob("model-00001-of-*.safetensors"))
    written = first.stat().st_mtime_ns
    assert start() == 0
    assert (target / first.name).stat().st_mtime_ns == written and not (target / "model.safetensors").exists()
    assert [path.name for path in (tmp_path / "export").glob("*sft*")] == ["sft"]
    tensors = {name: tensor for file in target.glob("*.safetensors") for name, tensor in load_file(file).items()}
    assert all(
        torch.equal(tensors[name], tensor) for name, tensor in load_file(tmp_path / "hf" / "model.safetensors").items()
    )


def test_a_conversion_that_is_told_to_save_keeps_its_files_and_goes_on(tmp_path, monkeypatch, capsys):
    """USR1 in the middle: exit code 75. The next start writes only what is missing."""
    tiny_bloom(tmp_path / "hf", layers=2, vocab=100)
    config = tmp_path / "convert/config.json"
    config.parent.mkdir()
    config.write_text(json.dumps({"paths": {"output": str(config.parent), "model": str(tmp_path / "hf")}}))
    monkeypatch.setattr(sys, "argv", ["hf_to_megatron", str(config)])
    whole, names = work._write, []

    def told_after_two(aside, name, *rest):
        whole(aside, name, *rest)
        names.append(name)
        if len(names) == 2:
            os.kill(os.getpid(), signal.SIGUSR1)
            time.sleep(1)  # the other threads find that they are to stop

    monkeypatch.setattr(work, "_write", told_after_two)
    monkeypatch.setattr(work, "THREADS", 1)
    monkeypatch.setattr(torch_dist, "FILE_BYTES", 50_000)
    before = {number: signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGTERM)}
    start = partial(command.main, ConvertConfig, convert, hf_to_megatron.arguments(), None)
    try:
        assert start() == os.EX_TEMPFAIL and "stopped by SIGUSR1: what is written is kept" in capsys.readouterr().out
        assert start() == 0
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert len(names) == len(set(names)) > 2, "no file was written twice"
    assert (config.parent / "latest").read_text() == "0\n"


def with_little_memory(folder: Path) -> None:
    data = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmData"))
    limit = 1024 * int(data.split()[1]) + 200 * 2**20
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    convert_to(folder)
    export_from(folder)


def test_a_tensor_larger_than_the_memory_goes_both_ways(tmp_path):
    """The embedding has 307 MB; the kernel gives the process 200 MB more than it begins with."""
    sparse_bloom(tmp_path / "hf", 2_400_000)
    run(with_little_memory, 1, 1, 1, tmp_path)
    back, file = tmp_path / "export" / "sft" / "model.safetensors", tmp_path / "hf" / "model.safetensors"
    assert back.stat().st_size == file.stat().st_size > 300e6 and checksums.digest(back) == checksums.digest(file)
    shutil.rmtree(tmp_path)


def test_files_are_written_at_the_same_time(tmp_path):
    """Each writer waits for the other: one after the other they would never end."""
    both = threading.Barrier(2, timeout=20)

    def writer(file, count):
        both.wait()
        count(file.write(b"12"))
        return {"at": file.tell()}

    written = work.write_files(tmp_path, {"a": writer, "b": writer}, {"a": 2, "b": 2}, "test")
    assert written["a"] == written["b"] == work.Written({"at": 2}, hashlib.sha256(b"12").hexdigest())


def test_progress_tells_bytes_per_second_and_what_was_there():
    progress = work.Progress("convert", 4 * 10**9, 10**9)
    progress.started -= 10
    progress.add(10**9)
    assert (
        progress.text()
        == f"convert {'━' * 12}{'─' * 12}  50%  2.00 of 4.00 GB  100 MB/s  20 s left, 1.00 GB were there"
    )


def test_what_was_begun_from_other_files_is_not_gone_on_with(tmp_path):
    aside = tmp_path / "aside"
    for source, kept in (("a", False), ("a", True), ("b", False)):
        with work.folder(aside, {"from": source}, 0):
            assert (aside / "old").exists() == kept
            (aside / "old").touch()
    shutil.rmtree(aside)


def test_files_hold_whole_tensors_and_a_key_has_one_type(monkeypatch):
    shape = bloom.shape(2, 64, 8, 300, 1e-5)
    table = {entry.name: Stored.of_tensor(torch.zeros(4)) for entry in torch_dist.entries(shape, "tied")}
    monkeypatch.setattr(torch_dist, "FILE_BYTES", 80)
    files = torch_dist.plan(table, shape, "tied")
    assert [len(parts) for parts in files.values()] == [5, 5, 5, 5, 5, 4]
    with pytest.raises(
        ConfigError, match="h.1.mlp.dense_4h_to_h.bias is torch.float16, in layer 0 it is torch.float32"
    ):
        torch_dist.plan(table | {"h.1.mlp.dense_4h_to_h.bias": Stored.of_tensor(torch.zeros(4).half())}, shape, "tied")
