"""How a rank leaves its groups: with the others, or alone and at once."""

import multiprocessing
import os
import sys

import pytest
import torch.distributed as dist

from launcher.job.ranks import reserved_port
from tests.support.learners import settings
from training import main
from training.config.trainers import SFTConfig
from training.distributed import groups as parallel
from training.errors import ConfigError, Interrupted

destroy = dist.destroy_process_group


def destroy_together(*groups):
    """As NCCL does, and gloo does not."""
    dist.barrier()
    destroy(*groups)


def rank(number: int, port: int, folder, errors: list[BaseException | None]) -> None:
    """A stage on two ranks in which each raises its error, or waits in a collective for the
    others."""
    os.environ.update(
        RANK=str(number), WORLD_SIZE="2", LOCAL_RANK=str(number), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    dist.destroy_process_group = destroy_together
    main.load = lambda *_: settings(folder, (1, 2))
    sys.argv, sys.stderr = ["stage", "config.json"], open(folder / f"{number}.log", "w")  # noqa: SIM115 - until the process ends

    def stage(config):
        if errors[number]:
            raise errors[number]
        dist.all_reduce(parallel.torch.zeros(1))

    os._exit(main.run_stage(SFTConfig, stage))


@pytest.mark.parametrize(
    "errors, codes",
    [
        ([None, RuntimeError("out of memory")], [None, 1]),
        ([None, ConfigError("lr: expected a number")], [None, parallel.EX_USAGE]),
        ([Interrupted("saved")] * 2, [parallel.EX_TEMPFAIL] * 2),
    ],
)
def test_a_rank_that_fails_alone_waits_for_nobody(tmp_path, errors, codes):
    holder = reserved_port()
    port = holder.getsockname()[1]
    processes = [
        multiprocessing.get_context("fork").Process(target=rank, args=(number, port, tmp_path, errors))
        for number in range(2)
    ]
    for process in processes:
        process.start()
    for process, code in zip(reversed(processes), reversed(codes), strict=True):
        process.join(20 if code is not None else 0.5)
    ended = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    # gloo tells the other one; NCCL does not
    assert ended[1] == codes[1] and ended[0] in (codes[0], 1)
    if errors[0] is None:
        assert str(errors[1]) in (tmp_path / "1.log").read_text()


def test_a_reserved_port_is_the_rendezvous_alone():
    """The kernel gives it to no other run on the machine meanwhile; torch listens on it."""
    holder = reserved_port()
    port = holder.getsockname()[1]
    others = [reserved_port() for _ in range(500)]
    assert port not in {other.getsockname()[1] for other in others}
    store = dist.TCPStore("127.0.0.1", port, 1, True)
    store.set("name", "value")
    assert store.get("name") == b"value"
    for each in (holder, *others):
        each.close()
