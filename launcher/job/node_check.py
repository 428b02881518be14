"""``python -m launcher.job.node_check FOLDER NODES CHECK``: what preflight runs on each node, one
process a node. Standard library only.

Prints one JSON line: {"node", "time", "bad": reasons}. The folder is on the file system that the
run is on; its file ``canary`` was written on the first node a moment ago.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ALL_S = float(os.environ.get("CONVOY_CHECK_S", "90"))
"""Seconds for all checks of a node: the profile's preflight_s."""
SEE_S = NETWORK_S = ALL_S / 6
"""Seconds for a file to appear on another node (NFS refreshes caches after 3 to 60 s), or an
answer."""
CHECK_S = ALL_S * 2 / 3
"""Seconds for nvidia-smi, and for the site's own check."""
TMP_BYTES = 100_000_000
"""Free bytes that a node's temporary folder needs."""
BUSY_MIB = 2_000
"""Memory of a GPU in use above which somebody else is on it (the driver itself takes up to about
600 MiB)."""


def canary(folder: Path, node: str) -> str:
    """ "" when this node sees what the first one wrote, and can write there itself."""
    token, deadline = os.environ["CONVOY_CANARY"], time.monotonic() + SEE_S
    try:
        while not (folder / "canary").exists() or (folder / "canary").read_text() != token:
            if time.monotonic() > deadline:
                canary = folder / "canary"
                return (
                    f"does not see {canary} as the first node wrote it, after {SEE_S:.0f} s: "
                    "the file system is not shared"
                )
            time.sleep(0.1)
        (folder / f"{node}.seen").write_text(token)
    except OSError as error:
        return f"can't use the run folder: {error}"
    return ""


def disk() -> str:
    """ "" when the node's temporary folder can be used."""
    try:
        with tempfile.NamedTemporaryFile() as file:
            file.write(b"x" * 4096)
            file.flush()
        free = shutil.disk_usage(tempfile.gettempdir()).free
    except OSError as error:
        return f"its temporary folder {tempfile.gettempdir()} can't be written: {error}"
    return (
        ""
        if free >= TMP_BYTES
        else f"{free / 1e6:.0f} MB free in {tempfile.gettempdir()}, {TMP_BYTES / 1e6:.0f} MB needed"
    )


def network(folder: Path, index: int, nodes: int) -> str:
    """ "" when a sum over all nodes, through the first, comes back within NETWORK_S: a name that
    resolves, a route, no firewall."""
    if nodes == 1:
        return ""
    deadline, place = time.monotonic() + NETWORK_S, folder / "listener.json"
    try:
        return _collect(place, nodes, deadline) if index == 0 else _send(place, index, nodes, deadline)
    except OSError as error:
        return f"network: {error}"


def _collect(place: Path, nodes: int, deadline: float) -> str:
    with socket.create_server(("", 0)) as server:
        aside = place.with_suffix(".new")
        aside.write_text(
            json.dumps([os.environ["CONVOY_ADDRESS"], server.getsockname()[1], os.environ["CONVOY_CANARY"]])
        )
        os.replace(aside, place)
        peers, total = [], 0
        while len(peers) < nodes - 1:
            server.settimeout(max(0.1, deadline - time.monotonic()))
            try:
                peer, _ = server.accept()
            except TimeoutError:
                return ""  # each that did not come says so itself, or says nothing at all
            peer.settimeout(NETWORK_S)
            peers.append(peer)
            try:
                total += int(peer.makefile().readline())
            except (OSError, ValueError):  # it died or hangs: its own check says nothing
                return ""
        for peer in peers:
            with contextlib.suppress(OSError), peer:
                peer.sendall(f"{total}\n".encode())
    return ""


def _send(place: Path, index: int, nodes: int, deadline: float) -> str:
    while True:
        try:
            host, port, written = json.loads(place.read_text())
            if written == os.environ["CONVOY_CANARY"]:
                break
        except FileNotFoundError:
            pass
        if time.monotonic() > deadline:
            return "network: the first node told no one where it listens"
        time.sleep(0.05)
    try:
        connection = socket.create_connection((host, port), timeout=max(1.0, deadline - time.monotonic()))
    except OSError as error:
        return f"network: can't reach the first node at {host}: {error}"
    with connection:
        try:
            connection.sendall(f"{index}\n".encode())
            answer = connection.makefile().readline()
        except TimeoutError:
            answer = ""
        except OSError as error:
            return f"network: can't reach the first node at {host}: {error}"
    # a peer that never came leaves the sum open: that one is at fault, not this node
    return (
        ""
        if not answer or int(answer) == sum(range(1, nodes))
        else f"network: the sum over all nodes is {answer.strip()}"
    )


def gpus(count: int) -> str:
    """ "" when the driver shows ``wanted`` GPUs, and this job's are empty and have no memory
    errors."""
    fields = "index,uuid,memory.used,ecc.errors.uncorrected.volatile.total"
    query = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=CHECK_S, check=False)
    except FileNotFoundError:
        return "nvidia-smi is not there: no driver"
    except subprocess.TimeoutExpired:
        return f"nvidia-smi did not answer in {CHECK_S:.0f} s: a GPU hangs"
    if done.returncode:
        return f"nvidia-smi: {(done.stdout + done.stderr).strip()}"
    return judge_gpus(done.stdout, count, os.environ.get("CUDA_VISIBLE_DEVICES", ""))


def judge_gpus(text: str, count: int, visible: str) -> str:
    """The same from nvidia-smi's rows ``index, uuid, MiB used, uncorrected errors``.

    ``visible`` is CUDA_VISIBLE_DEVICES as Slurm sets it: where no cgroup hides them, nvidia-smi
    lists other jobs' GPUs, too.
    """
    rows = [[part.strip() for part in line.split(",")] for line in text.splitlines() if line.count(",") == 3]
    if len(rows) < count:
        return f"{len(rows)} GPU(s) visible, {count} asked for"
    own = own_gpus(rows, visible)
    if len(own) > count:
        return ""  # which of them are ours is not known
    for index, _, used, errors in own:
        if re.fullmatch(r"\d+", errors) and int(errors):
            return f"GPU {index} has {errors} uncorrected memory errors"
        if re.fullmatch(r"\d+", used) and int(used) > BUSY_MIB:
            return f"GPU {index} is not empty: {used} MiB in use"
    return ""


def own_gpus(rows: list[list[str]], visible: str) -> list[list[str]]:
    """Those of nvidia-smi's ``rows`` (index, uuid, ...) that CUDA_VISIBLE_DEVICES names; all
    where it names none or others."""
    names = [name.strip() for name in visible.split(",") if name.strip()]
    own = [
        row
        for row in rows
        if any(name == row[0] or (name.startswith("GPU-") and row[1].startswith(name)) for name in names)
    ]
    return own if len(own) == len(names) > 0 else rows


def site_check(command: str) -> str:
    """ "" when the site's own command exits 0; else its last line."""
    if not command:
        return ""
    try:
        done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=CHECK_S, check=False)
    except subprocess.TimeoutExpired:
        return f"node_check did not end in {CHECK_S:.0f} s"
    lines = (done.stdout + done.stderr).strip().splitlines()
    return f"node_check: {lines[-1] if lines else f'exit code {done.returncode}'}" if done.returncode else ""


def main(arguments: list[str]) -> int:
    folder, nodes, gpus_per_node = Path(arguments[0]), int(arguments[1]), int(arguments[2])
    node, index = os.environ["SLURMD_NODENAME"], int(os.environ["SLURM_PROCID"])
    now = time.time()
    bad = [
        canary(folder, node),
        disk(),
        gpus(gpus_per_node) if gpus_per_node else "",
        site_check(os.environ.get("CONVOY_NODE_CHECK", "")),
    ]
    bad.append(network(folder, index, nodes))
    print(json.dumps({"node": node, "time": now, "bad": [reason for reason in bad if reason]}), flush=True)
    return 0


if __name__ == "__main__" and {"-h", "--help"} & set(sys.argv[1:]):
    print(__doc__)
    sys.exit(0)
if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
