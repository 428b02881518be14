"""A checkpoint is complete or not there, at whatever moment its writers die. It loads at any layout.
A damaged one is refused with the name of its file."""

import io
import itertools
import json
import math
import multiprocessing
import os
import pickle
import random
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest
import torch
from megatron.core import parallel_state
from torch.distributed.checkpoint import FileSystemReader

from tests.support.distributed import run
from tests.support.learners import fill, learner, settings, wrong
from training.checkpoint import checksums, format, safe_unpickle, strategies, writer
from training.checkpoint.stage_folder import StageFolder
from training.checkpoint.writer import SaveFailed, Saver
from training.distributed.groups import ranks
from training.errors import ConfigError, Damaged
from training.models import lora
from training.optim.boxes import boxes


def saved(stage: Path, layout: tuple[int, int, int], *numbers: int, **values) -> None:
    """Real checkpoints of a small model at ``layout`` (TP, PP, DP)."""

    def save():
        config = settings(stage, layout[:2], **values)
        trained = learner(config)
        saver = Saver(StageFolder(stage), {"model": trained}, config)
        for number in numbers:
            fill(trained, number)
            trained.schedule.num_steps = number
            saver.save(number, {})
        saver.wait()

    run(save, *layout)


def loaded(stage: Path, layout: tuple[int, int, int], number: int, **values) -> None:
    """Load at ``layout`` and compare every element of every rank, weights and optimizer."""

    def load():
        trained = learner(settings(stage, layout[:2], **values))
        state = format.load(StageFolder(stage).resolve(number), {"model": trained})
        assert state["iteration"] == number == trained.schedule.num_steps
        assert wrong(trained, number) == []

    run(load, *layout)


LAYOUTS = [
    (1, 1, 1, 1),
    (2, 1, 1, 1),
    (1, 2, 2, 1),
    (3, 1, 1, 1),
    (1, 2, 1, 2),
    (1, 4, 1, 1),
    (2, 2, 1, 2),
    (1, 1, 3, 1),
    (2, 1, 2, 1),
    (1, 3, 1, 1),
]
"""TP x PP x DP and parts of a stage (interleaved schedule); three stages for four layers: an uneven
split."""


def test_every_element_survives_a_walk_through_layouts(tmp_path):
    """Each layout loads what the one before saved, and saves: bf16 weights, fp32 masters and both
    moments, padding zero."""

    def move(layout, number):
        parallel_state.destroy_model_parallel()
        parallel_state.initialize_model_parallel(*layout[:2], layout[3] if layout[3] > 1 else None)
        config = settings(tmp_path, layout[:2], virtual_pipeline=layout[3])
        trained = learner(config)
        if number > 1:
            assert (
                format.load(StageFolder(tmp_path).resolve(), {"model": trained})["iteration"]
                == number - 1
                == trained.schedule.num_steps
            )
            assert wrong(trained, number - 1) == []
        fill(trained, number)
        trained.schedule.num_steps = number
        Saver(StageFolder(tmp_path), {"model": trained}, config).save(number, {})

    for number, layout in enumerate([*LAYOUTS, LAYOUTS[0]], 1):
        run(move, *layout[:3], layout, number)


def test_boxes_are_the_range_in_order():
    draw = random.Random(0)
    for _ in range(500):
        shape = tuple(draw.randint(1, 5) for _ in range(draw.randint(1, 3)))
        start = draw.randint(0, math.prod(shape))
        stop = draw.randint(start, math.prod(shape))
        index = torch.arange(math.prod(shape)).view(shape)
        positions = [
            index[tuple(slice(o, o + s) for o, s in zip(offset, size, strict=True))].reshape(-1)
            for offset, size in boxes(shape, start, stop)
        ]
        assert torch.cat([*positions, torch.empty(0, dtype=torch.long)]).tolist() == list(range(start, stop))
        assert len(positions) <= 2 * len(shape) - 1


def test_staging_keeps_a_place_for_each_tensor_at_one_address_and_none_for_those_that_are_gone():
    """A weight, and its first elements' box of the optimizer's, begin at one address. Replaced
    buffers would stay pinned until the process ends."""
    weight, staging = torch.arange(8.0), writer._Staging()
    for _ in range(2):
        assert torch.equal(staging.copy(weight), weight) and torch.equal(staging.copy(weight[:3]), weight[:3])
        staging.drop_unused()
        places = dict(staging.buffers)
        assert len(places) == 2
    staging.copy(weight), staging.copy(weight[:3])
    assert all(staging.buffers[key] is places[key] for key in places)
    staging.drop_unused()
    staging.copy(weight)
    staging.drop_unused()
    assert list(staging.buffers) == [(weight.data_ptr(), weight.nbytes)]


FILE_CALLS = {"open", "write", "fsync", "replace", "rename", "mkdir", "unlink", "rmdir", "close"}
RAW_WRITES = 100
"""Of the tensors' writes (97 % of all calls) one in so many is a point, so that naming, renaming
and deleting get most of them."""


def _attempt(rank: int, folder: str, stage: str, victim: int, nth: int, asynchronous: bool) -> None:
    """One rank of a job: load what ``latest`` names, check it, save once, save again; ``victim``
    dies at its ``nth`` call to the file system in that second save, whichever thread makes it
    (RAW_WRITES)."""
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    calls, writes = itertools.count(), itertools.count()

    def count(frame, event, function):
        if event != "c_call" or function.__name__ not in FILE_CALLS or isinstance(function.__self__, str):
            return
        if isinstance(function.__self__, io.FileIO) and function.__name__ == "write" and next(writes) % RAW_WRITES:
            return
        if next(calls) == nth and rank == victim:
            os.kill(os.getpid(), signal.SIGKILL)

    with ranks(1, 2, 1, init_method=f"file://{folder}/store"):
        config = settings(stage, (1, 2), keep_checkpoints=2, async_save=asynchronous)
        trained = learner(config)
        start = StageFolder(stage).latest() or 0
        if start:
            assert format.load(StageFolder(stage).resolve(), {"model": trained})["iteration"] == start
            assert wrong(trained, start) == []
        saver = Saver(StageFolder(stage), {"model": trained}, config)
        for number in (start + 1, start + 2):
            fill(trained, number)
            if number == start + 2:
                threading.setprofile(count)
                sys.setprofile(count)
                saver.pool = type(saver.pool)(1)  # threads that are profiled
            saver.save(number, {})
            saver.wait()
        sys.setprofile(None)
        Path(folder, f"{rank}.done").write_text(str(next(calls)))
    os._exit(0)


def job(stage: Path, victim: int, nth: int, asynchronous: bool) -> list[int]:
    """Both ranks in processes of their own; the first to die takes the other with it -> file-system
    calls of each, if all went well."""
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(target=_attempt, args=(rank, folder, str(stage), victim, nth, asynchronous))
            for rank in range(2)
        ]
        for process in processes:
            process.start()
        multiprocessing.connection.wait([process.sentinel for process in processes], timeout=60)
        if any(process.exitcode for process in processes):
            for process in processes:
                process.kill()
        for process in processes:
            process.join(60)
        codes = [process.exitcode for process in processes]
        assert codes == [0, 0] or codes[victim] == -signal.SIGKILL and nth >= 0, codes
        return [int(Path(folder, f"{rank}.done").read_text()) for rank in range(2)] if codes == [0, 0] else []


def test_kill_9_at_20_random_points_of_a_save(tmp_path):
    """After each kill the next job loads a complete checkpoint, element by element, and saves."""
    draw = random.Random(20)
    total = job(tmp_path, 0, -1, False)
    assert min(total) > 10
    done = []
    for number in range(20):
        before = StageFolder(tmp_path).latest()
        victim = draw.randrange(2)
        # towards the end: renaming, ``latest``, deleting
        nth = total[victim] - 1 - int(total[victim] * draw.random() ** 2)
        assert not job(tmp_path, victim, nth, asynchronous=bool(number % 2)), (
            f"call {nth} of {total[victim]} was never made"
        )
        done.append(StageFolder(tmp_path).latest() - before - 1)
        checksums.check(StageFolder(tmp_path).resolve())
    assert set(done) == {0, 1}, (
        "some died before their checkpoint was named, some after; the save before the kill is always there"
    )
    assert job(tmp_path, 0, -1, True), "what the kills left behind does not disturb a save"
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        StageFolder(tmp_path).checkpoint(number).name for number in StageFolder(tmp_path).iterations()
    ]


def test_an_asynchronous_save_holds_the_step_it_was_asked_at(tmp_path):
    """Training goes on and overwrites every tensor before a byte is written; a later boundary
    publishes; its times are reported once."""

    def train():
        config = settings(tmp_path, (1, 2), async_save=True)
        trained = learner(config)
        saver = Saver(StageFolder(tmp_path), {"model": trained}, config)
        go = threading.Event()
        saver.pool.submit(go.wait, 30)  # the writer has not begun
        fill(trained, 1)
        saver.save(1, {})
        fill(trained, 99)
        early = saver.poll()
        assert early == {} and StageFolder(tmp_path).latest() is None
        go.set()
        while not (times := saver.poll()):
            fill(trained, 98)
        assert StageFolder(tmp_path).latest() == 1 and saver.poll() == {}
        assert 0 < times["save_stall_s"] < times["save_s"]
        for number in (2, 3):
            fill(trained, number)
            trained.schedule.num_steps = number
            saver.save(number, {})  # waits for the one before
        assert StageFolder(tmp_path).latest() == 2
        saver.wait()
        assert StageFolder(tmp_path).latest() == 3

    run(train, 1, 2, 1)
    for number in (2, 3):
        loaded(tmp_path, (1, 1, 1), number)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_writer_that_fails_is_an_error_on_every_rank(tmp_path, asynchronous):
    """The operating system refuses bytes of rank 1's second file: rank, file and cause in one
    message; the checkpoint before is complete."""
    saved(tmp_path, (1, 2, 1), 1)

    def save():
        import resource

        config = settings(tmp_path, (1, 2), async_save=asynchronous)
        trained = learner(config)
        saver = Saver(StageFolder(tmp_path), {"model": trained}, config)
        if torch.distributed.get_rank() == 1:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
        with pytest.raises(SaveFailed) as caught:
            saver.save(2, {})
            while not saver.poll():
                pass
        return str(caught.value)

    first, second = run(save, 1, 2, 1)
    assert first == second
    assert (
        "saving iteration 2 failed on rank 1" in first and "File too large" in first and "model/__1_0.distcp" in first
    )
    assert "iteration 1 is complete" in first
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["iter_0000001"]
    assert StageFolder(tmp_path).latest() == 1
    loaded(tmp_path, (1, 1, 1), 1)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 3 MB: two checkpoints of the small model do not fit."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=3m", "convoy-test", str(folder)], capture_output=True
    ).returncode:
        pytest.skip("mounting a small file system needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("checked", [True, False], ids=["checked before", "while writing"])
def test_a_full_disk_leaves_the_checkpoint_before(small_disk, checked):
    saved(small_disk, (1, 1, 1), 1)

    def save():
        config = settings(small_disk)
        trained = learner(config)
        saver = Saver(StageFolder(small_disk), {"model": trained}, config)
        if not checked:  # as under a quota, which disk_usage does not know
            saver._make_folders = lambda aside, needed: Saver._make_folders(saver, aside, 0)
        with pytest.raises(SaveFailed) as caught:
            saver.save(2, {})
        return str(caught.value)

    message = run(save, 1, 1, 1)[0]
    assert "No space left on device" in message and "GB are free" in message and "iteration 1 is complete" in message
    assert ("__0_" in message) is not checked
    assert [path.name for path in (small_disk / "checkpoints").iterdir()] == ["iter_0000001"]
    loaded(small_disk, (1, 1, 1), 1)


def test_sha256sum_agrees(tmp_path):
    saved(tmp_path, (1, 2, 1), 1)
    folder = StageFolder(tmp_path).checkpoint(1)
    shown = subprocess.run(
        ["sha256sum", "--strict", "-c", "SHA256"], cwd=folder, capture_output=True, text=True, check=True
    )
    assert sorted(line.partition(":")[0] for line in shown.stdout.splitlines()) == checksums.files(folder)
    assert {"state.json", "model/.metadata", "model/common.pt", "model/metadata.json", "model/__1_0.distcp"} <= set(
        checksums.files(folder)
    )


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 7)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("name", "harm", "message"),
    [
        ("model/__0_0.distcp", flip, "does not have the sha256"),
        ("model/__1_0.distcp", truncate, "does not have the sha256"),
        ("model/.metadata", truncate, "does not have the sha256"),
        ("state.json", flip, "does not have the sha256"),
        ("model/__0_0.distcp", Path.unlink, "is missing"),
        ("SHA256", Path.unlink, "is missing: not a complete checkpoint"),
        ("SHA256", truncate, "truncated or overwritten"),
        ("SHA256", lambda path: path.write_text(""), "truncated or overwritten"),
        ("SHA256", lambda path: path.write_text("0" * 64 + "  ../../secret\n"), "not below"),
    ],
)
def test_a_damaged_checkpoint_is_refused_with_its_file(two_saves, tmp_path, name, harm, message):
    """On both ranks alike, whichever of them read the file; the launcher's check says the same
    without torch."""
    subprocess.run(["cp", "-r", f"{two_saves}/.", str(tmp_path)], check=True)
    folder = StageFolder(tmp_path).checkpoint(2)
    harm(folder / name)

    def load():
        with pytest.raises(Damaged) as caught:
            format.load(folder, {"model": learner(settings(tmp_path, (1, 2)))})
        return str(caught.value)

    messages = set(run(load, 1, 2, 1))
    assert len(messages) == 1 and str(folder / name) in messages.copy().pop() and message in messages.copy().pop()
    assert "--load-iteration (there are: 1), not from 2" in messages.pop()
    with pytest.raises(Damaged, match=message):
        checksums.check(folder)
    checksums.check(StageFolder(tmp_path).checkpoint(1))


@pytest.fixture(scope="module")
def two_saves(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("two_saves")
    saved(folder, (1, 2, 1), 1, 2)
    return folder


def test_large_files_can_be_left_to_the_size_check(two_saves, tmp_path):
    subprocess.run(["cp", "-r", f"{two_saves}/.", str(tmp_path)], check=True)
    folder = StageFolder(tmp_path).checkpoint(2)
    flip(folder / "model" / "__0_0.distcp")
    checksums.check(folder, largest=20_000)
    checksums.check(folder, below="other")
    with pytest.raises(Damaged):
        checksums.check(folder, below="model")


class Evil:
    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def test_no_pickle_of_a_checkpoint_runs_code(two_saves, tmp_path):
    """Neither one in .metadata nor an entry that claims to be bytes, which torch would unpickle,
    with checksums that agree."""
    subprocess.run(["cp", "-r", f"{two_saves}/.", str(tmp_path)], check=True)
    folder, mark = StageFolder(tmp_path).checkpoint(2), tmp_path / "executed"
    metadata = folder / "model" / ".metadata"
    described = pickle.loads(metadata.read_bytes())

    def refuse(message):
        checksums.write(folder)

        def load():
            with pytest.raises(Damaged, match=message) as caught:
                format.load(folder, {"model": learner(settings(tmp_path))})
            return str(caught.value)

        assert str(metadata) in run(load, 1, 1, 1)[0] and not mark.exists()

    metadata.write_bytes(pickle.dumps(Evil(mark)))
    refuse(r"posix\.mkdir")
    described.storage_meta = Evil(mark)
    metadata.write_bytes(pickle.dumps(described))
    refuse(r"posix\.mkdir")
    described.storage_meta = None
    described.state_dict_metadata["embedding.word_embeddings.weight"] = (
        torch.distributed.checkpoint.metadata.BytesStorageMetadata()
    )
    metadata.write_bytes(pickle.dumps(described))
    refuse("BytesStorageMetadata")
    metadata.write_bytes(metadata.read_bytes()[:100])
    refuse("truncated or changed")
    subprocess.run(["cp", str(StageFolder(tmp_path).checkpoint(1) / "model" / ".metadata"), str(metadata)], check=True)
    metadata = folder / "model" / "common.pt"
    torch.save({"optimizer": Evil(mark)}, metadata)
    refuse("can't be read weights-only")
    with open(StageFolder(tmp_path).checkpoint(1) / "model" / ".metadata", "rb") as file:
        assert safe_unpickle.load(file).state_dict_metadata


def unpickled_by_an_allow_list(read, mark: Path) -> str:
    """What a reader says of a ``.metadata`` that would run code."""
    with pytest.raises((Damaged, torch.distributed.checkpoint.api.CheckpointException)) as caught:
        read()
    assert not mark.exists()
    return str(caught.value)


@pytest.mark.parametrize("reader", ["megatron-core's strategy", "its tensors' metadata", "all its metadata", "torch's"])
def test_each_reader_refuses_a_pickle_that_runs_code(two_saves, tmp_path, reader):
    """Each by itself, without the check before a load: plain pickle would make the folder
    ``executed``."""
    subprocess.run(["cp", "-r", f"{two_saves}/.", str(tmp_path)], check=True)
    folder, mark = StageFolder(tmp_path).checkpoint(2) / "model", tmp_path / "executed"
    (folder / ".metadata").write_bytes(pickle.dumps(Evil(mark)))
    strategy = strategies.LoadStrategy()

    def refuse():
        tensors = {"model": learner(settings(tmp_path)).model.sharded_state_dict()}
        read = {
            "megatron-core's strategy": lambda: strategies.load(tensors, folder),
            "its tensors' metadata": lambda: strategy.load_tensors_metadata(folder),
            "all its metadata": lambda: strategy.load_sharded_metadata(folder),
            "torch's": lambda: lora.absorb(strategies.SafeReader(folder), learner(settings(tmp_path)).model),
        }[reader]
        return unpickled_by_an_allow_list(read, mark)

    assert "posix.mkdir" in run(refuse, 1, 1, 1)[0]


def test_no_load_reads_a_pickle_by_itself(two_saves, tmp_path, monkeypatch):
    """Neither torch's nor megatron-core's own reader is constructed anywhere: both would unpickle."""

    def refuse(self, *args, **kwargs):
        raise AssertionError("plain pickle")

    monkeypatch.setattr(FileSystemReader, "read_metadata", refuse)
    folder = StageFolder(two_saves).checkpoint(2)

    def load():
        model = learner(settings(tmp_path))
        format.load(folder, {"model": model})
        format.load_weights(folder / "model", model.model)

    run(load, 1, 1, 1)


def test_every_nth_is_kept_for_good(tmp_path):
    saved(tmp_path, (1, 1, 1), 2, 4, 6, 8, 9, 10, save_every=2, keep_every=4, keep_checkpoints=1)
    assert StageFolder(tmp_path).iterations() == [4, 8, 10]


def test_keep_every_must_meet_save_every():
    with pytest.raises(ValueError, match=r"keep_every = 150 is not a multiple of save_every = 100"):
        settings("x", keep_every=150, save_every=100)


def test_a_broken_mark_and_stray_folders_are_told(tmp_path):
    for name in ("iter_0000003", "iter_0000004.old", "iter_best", ".iter_0000005.saving"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    (tmp_path / "checkpoints" / "iter_0000003" / "model").mkdir()
    assert StageFolder(tmp_path).iterations() == [3] and StageFolder(tmp_path).latest() is None
    for text in ("", "\n", "seven", "7\n8\n"):
        (tmp_path / "latest").write_text(text)
        with pytest.raises(ConfigError, match=r"latest holds .*, no iteration; present: 3"):
            StageFolder(tmp_path).resolve()
    (tmp_path / "latest").write_text("7\n")
    with pytest.raises(ConfigError, match="iteration 7 is not there; present: 3"):
        StageFolder(tmp_path).resolve()
    with pytest.raises(Damaged, match="SHA256 is missing: not a complete checkpoint"):
        checksums.check(StageFolder(tmp_path).resolve(3))


def test_publishing_an_iteration_again_never_leaves_latest_naming_nothing(tmp_path):
    """Only convert does: its iteration 0, when it runs twice."""
    for text in ("first", "second"):
        aside = tmp_path / "checkpoints" / ".iter_0000000.saving"
        aside.mkdir(parents=True)
        (aside / "state.json").write_text(json.dumps(text))
        StageFolder(tmp_path).publish(aside, 0)
        assert json.loads((StageFolder(tmp_path).resolve() / "state.json").read_text()) == text
        checksums.check(StageFolder(tmp_path).resolve())
