"""Another user of the machine can neither run anything on a cluster of slurm/dev, nor empty a file
of its owner, nor block it."""

import os
import socket
import subprocess
import tempfile
from pathlib import Path

import pytest

from tests.slurm.cluster import PATH, Cluster
from tests.support.stub_project import ROOT

OTHER = 54_321
"""A user that no machine has."""
pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as another user")


@pytest.fixture(scope="module")
def cluster(slurm_installed):
    with Cluster(NODES=1) as one:
        one.folder.chmod(0o755)  # as runs/ of a project is
        yield one


@pytest.fixture
def public():
    """A folder as /tmp: all may write. pytest's own folders are closed to others, at a depth that
    its options choose."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        folder = Path(name) / "tmp"
        folder.mkdir()
        folder.chmod(0o1777)
        yield folder


def as_other(*command: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        command,
        user=OTHER,
        group=OTHER,
        extra_groups=[],
        cwd="/",
        text=True,
        capture_output=True,
        timeout=60,
        env={"PATH": PATH, **environment},
    )


def up(folder: Path, **environment: str) -> subprocess.CompletedProcess:
    # not a pipe: a daemon that kept it open would hang the test
    with open(os.devnull, "w") as nowhere:
        return subprocess.run(
            [ROOT / "slurm/dev/up"],
            stdout=nowhere,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
            env={**os.environ, "CONVOY_DEV": str(folder), **environment},
        )


def test_another_user_can_t_run_anything_on_the_cluster(cluster, public):
    known = public / "slurm.conf"  # he can write it himself: nothing in it is secret
    known.write_text((cluster.folder / "slurm.conf").read_text())
    known.chmod(0o644)
    mark = public / "mark"
    tried = as_other("sbatch", "--wait", "-o", "/dev/null", f"--wrap=id -u > {mark}", SLURM_CONF=str(known))
    assert tried.returncode != 0 and "munge" in tried.stderr.lower(), tried
    assert not mark.exists()
    assert as_other("cat", str(cluster.folder / "munge" / "munge.key")).returncode != 0
    assert as_other("ls", str(cluster.folder / "munge")).returncode != 0
    assert cluster.call("sbatch", "--wait", "-o", "/dev/null", f"--wrap=id -u > {mark}") and mark.read_text() == "0\n"


def test_what_the_owner_alone_needs_is_open_to_him_alone(cluster):
    assert {
        path.name: oct(path.stat().st_mode & 0o777) for path in cluster.folder.iterdir() if path.is_dir()
    } == dict.fromkeys(("state", "spool", "run", "log", "dev", "munge"), "0o700")


def test_a_link_and_a_lock_of_another_user_neither_empty_a_file_nor_block(cluster, public):
    """The lock's name in /tmp was known, and opened through a link for writing."""
    precious = public.parent / "precious"
    precious.write_text("mine")
    name = public / "convoy-dev-0.lock"
    assert as_other("ln", "-s", str(precious), str(name)).returncode == 0
    again = up(
        cluster.folder,
        **{name: value for name, value in cluster.options.items() if name != "CONVOY_DEV"},
        TMPDIR=str(public),
    )
    assert again.returncode == 0 and precious.read_text() == "mine", again.stderr
    name.unlink()
    holder = subprocess.Popen(["flock", str(name), "sleep", "60"], user=OTHER, group=OTHER, extra_groups=[], cwd="/")
    try:
        again = up(
            cluster.folder,
            **{name: value for name, value in cluster.options.items() if name != "CONVOY_DEV"},
            TMPDIR=str(public),
        )
        assert again.returncode == 0, again.stderr
    finally:
        holder.kill()
        holder.wait()


@pytest.mark.parametrize("kind", ["his", "open"])
def test_a_folder_that_another_user_can_change_is_refused(public, kind):
    folder = public / "dev"
    if kind == "his":
        as_other("mkdir", str(folder))
    else:
        folder.mkdir()
        folder.chmod(0o777)
    refused = up(folder)
    assert refused.returncode == 1 and f"{folder} is not yours alone" in refused.stderr and not list(folder.iterdir())


def test_daemons_listen_on_the_loopback_address(cluster):
    if not socket.gethostbyname(socket.gethostname()).startswith("127."):
        pytest.skip(
            "this machine's name is not on its loopback: Slurm 22.05 then listens on all addresses, and up says so"
        )
    inodes = {
        line.split()[9]: line.split()[1]
        for line in Path("/proc/net/tcp").read_text().splitlines()[1:]
        if line.split()[3] == "0A"
    }
    inodes |= {
        line.split()[9]: line.split()[1]
        for line in Path("/proc/net/tcp6").read_text().splitlines()[1:]
        if line.split()[3] == "0A"
    }
    pids = [int(path.read_text()) for path in (cluster.folder / "run").glob("*.pid")]
    links = {os.readlink(path) for pid in pids for path in Path(f"/proc/{pid}/fd").iterdir()}
    listening = [address for inode, address in inodes.items() if f"socket:[{inode}]" in links]
    assert len(listening) == 2 and all(address.startswith("0100007F:") for address in listening), listening
    assert cluster.call("srun", "echo", "launched") == "launched\n"
