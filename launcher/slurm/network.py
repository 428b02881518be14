"""Communication environment of a site: the variables of slurm/networks/<name>.toml, and what the
adapters of the node need. The profile's own ``environment`` wins.

NVIDIA's advice is to set only what a site needs, so each variable has its reason; supervise prints
both in the log of each start. Sources: NCCL user guide (environment variables, networking
troubleshooting), CoreWeave's and IBM Cloud's NCCL references.
"""

from __future__ import annotations

import os
from pathlib import Path

from launcher.config.network import Network
from launcher.config.profile import Profile
from launcher.config.sections import near, read_toml
from launcher.slurm import site_files
from launcher.slurm.node_probe import adapters
from training.config.schema import build
from training.errors import ConfigError

ALWAYS = (
    ("NCCL_DEBUG", "WARN", "errors are said, nothing else is printed"),
    ("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1", "a rank whose peer died ends instead of waiting without end"),
    (
        "CUDA_DEVICE_MAX_CONNECTIONS",
        "1",
        "megatron-core overlaps tensor-parallel communication only with one hardware queue",
    ),
)
NO_INNER = (
    "NCCL_SOCKET_IFNAME",
    "^lo,docker,virbr,veth,cni",
    "the first connection must not go to an interface that ends in this "
    "machine; better the site's own, =ib0, in the profile's environment",
)
LARGE_FABRIC = (
    NO_INNER,
    ("NCCL_IB_TIMEOUT", "22", "17 s instead of 4 s before a lost packet is an error: link flaps on large fabrics"),
    ("NCCL_IB_RETRY_CNT", "7", "the most that the hardware retries"),
)
DEVICES = Path("/dev")


def load(name: str, profile: Path) -> Network:
    """The network of slurm/networks/<name>.toml, or of a file next to the ``profile`` when ``name``
    ends in .toml. ConfigError with the names that there are."""
    path = site_files.find("networks", name, profile.parent)
    if path is None:
        known = site_files.names("networks")
        raise ConfigError(
            f"{profile}: network = {name!r}: expected one of {', '.join(known)}{near(name, known)}; a network of your "
            'own is a file next to the profile, network = "mine-network.toml"'
        )
    return _read(path)


def named(name: str) -> Network:
    """A network of slurm/networks, by one of ``site_files.names``."""
    return _read(site_files.find("networks", name))


def _read(path: Path) -> Network:
    return build(Network, read_toml(path), f"network {path.stem}")


def variables(network: Network) -> list[tuple[str, str, str]]:
    """(variable, value, reason) of each variable that ranks on this network get."""
    own = [(name, line["value"], line["reason"]) for name, line in network.variables.items()]
    return [*ALWAYS, *own]


def environment(profile: Profile, ranks_here: int) -> list[tuple[str, str, str]]:
    """Variables that the profile's site adds for the ranks: its network's, then the device, then
    its own ``environment``."""
    detected = fabric(adapters()) if profile.network_table.adapters else ()
    lines = {line[0]: line for line in (*variables(profile.network_table), *detected)}
    if profile.device == "cpu" or (profile.device == "auto" and _gpus_here() < ranks_here):
        reason = (
            "the profile says so"
            if profile.device == "cpu"
            else f"this machine has {_gpus_here()} GPUs for {ranks_here} ranks"
        )
        lines["CUDA_VISIBLE_DEVICES"] = ("CUDA_VISIBLE_DEVICES", "", f"ranks run on the CPU: {reason}")
    for name, value in profile.environment.items():
        lines[name] = (name, value, f"profile {profile.name}")
    return list(lines.values())


def fabric(cards: list[dict]) -> list[tuple[str, str, str]]:
    """What ``auto`` adds for the RDMA adapters of this node (launcher.slurm.node_probe.adapters),
    taking the job's other nodes to be alike.

    RoCE needs no more than InfiniBand here: NCCL finds the address index itself from 2.21 on, and a
    traffic class can't be guessed.
    """
    active = [one for one in cards if one["active"]]
    if not active:
        return []
    top = max(one["gbps"] for one in active)
    fast, slow = ([one["name"] for one in active if (one["gbps"] == top) is is_fastest] for is_fastest in (True, False))
    lines = list(LARGE_FABRIC)
    if slow:
        reason = f"the adapters of {top} Gb/s on this node; {', '.join(slow)}: slower, as adapters for storage are"
        lines.append(("NCCL_IB_HCA", f"={','.join(fast)}", reason))
    return lines


def _gpus_here() -> int:
    """GPUs that processes of this machine may use."""
    devices = len(list(DEVICES.glob("nvidia[0-9]*")))
    # Slurm sets it for GPUs that are only pretended, too
    if devices and "CUDA_VISIBLE_DEVICES" in os.environ:
        return len([device for device in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if device])
    return devices
