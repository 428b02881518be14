"""Who is to blame in the check of the nodes: the one that is silent, not those that wait for it."""

import json
import socket
import threading
import time

import pytest

from launcher.job import node_check, preflight
from launcher.slurm.node_probe import gpu_rows


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setattr(node_check, "NETWORK_S", 1.0)
    monkeypatch.setenv("CONVOY_CANARY", "word")
    monkeypatch.setenv("CONVOY_ADDRESS", "127.0.0.1")
    return tmp_path


def run_nodes(folder, indices, nodes, apart_s=0) -> dict[int, str]:
    found = {}
    threads = [
        threading.Thread(target=lambda index=index: found.update({index: node_check.network(folder, index, nodes)}))
        for index in indices
    ]
    for thread in threads:
        thread.start()
        time.sleep(apart_s)
    for thread in threads:
        thread.join(10)
    return found


def test_the_sum_over_all_nodes_comes_back(place):
    assert run_nodes(place, range(3), 3) == {0: "", 1: "", 2: ""}


def test_a_node_that_hangs_is_not_blamed_on_the_others(place, monkeypatch):
    """The third gives up before the first, which still waits for the second."""
    monkeypatch.setattr(node_check, "NETWORK_S", 3.0)
    assert run_nodes(place, (2, 0), 3, apart_s=1.5) == {0: "", 2: ""}


def test_a_node_that_dies_in_the_middle_is_not_blamed_on_the_first(place):
    def die():
        while not (place / "listener.json").exists():
            time.sleep(0.01)
        _, port, _ = json.loads((place / "listener.json").read_text())
        socket.create_connection(("127.0.0.1", port)).close()

    threading.Thread(target=die).start()
    assert run_nodes(place, (0,), 2) == {0: ""}


def test_a_crash_of_the_check_is_told_from_silence():
    killed = ["srun: Job step aborted: Waiting up to 5 seconds", "srun: error: n1: task 0: Killed"]
    crashed = [
        "Traceback (most recent call last):",
        "ImportError: no libpython",
        "srun: error: n2: task 1: Exited with exit code 1",
    ]
    timed_out = preflight.Answers([], [*crashed, *killed], in_time=False)
    assert (timed_out.crashed(0), timed_out.crashed(2)) == ("", "") and timed_out.crashed(
        1
    ) == "ImportError: no libpython"
    assert preflight.Answers([], crashed, in_time=True).crashed(0) == "ImportError: no libpython"
    assert (
        preflight.Answers([], ["srun: error: Unable to create step"], in_time=True).crashed(0).endswith("create step")
    )


def test_gpus_that_do_not_say_their_memory_and_those_of_other_jobs():
    text = "0, GPU-a, NVIDIA GB10, [N/A], [N/A], [N/A]\n1, GPU-b, NVIDIA GB10, 81920, Enabled, 70000\n"
    rows = gpu_rows(text, "0")
    assert [(row["memory_gb"], row["mig"], row["used_mb"], row["ours"]) for row in rows] == [
        (0, False, 0, True),
        (80, True, 70000, False),
    ]
    assert all(row["ours"] for row in gpu_rows(text, ""))
