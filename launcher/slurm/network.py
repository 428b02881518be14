"""Communication environment of a site as data: (variable, value, reason). A profile names one
table; its own ``environment`` wins.

NVIDIA's advice is to set only what a site needs, so each line has its reason; supervise prints the
lines in the log of each start. Sources: NCCL user guide (environment variables, networking
troubleshooting), CoreWeave's and IBM Cloud's NCCL references. The tables of large fabrics have not
been run on such machines by us.
"""

from __future__ import annotations

import os
from pathlib import Path

from launcher.slurm.node_probe import adapters

ALWAYS = (
    ("NCCL_DEBUG", "WARN", "errors are said, nothing else is printed"),
    ("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1", "a rank whose peer died ends instead of waiting for ever"),
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
ONE_MACHINE = (
    ("GLOO_SOCKET_IFNAME", "lo", "all ranks are on this machine; its host name may not resolve to an address it has"),
)

DEVICES = Path("/dev")

NETWORKS = {
    "auto": (*ALWAYS, NO_INNER),  # and what fabric() finds on the node
    "one-machine": (*ALWAYS, *ONE_MACHINE),
    "a100-hdr-infiniband": (
        *ALWAYS,
        *LARGE_FABRIC,
        ("NCCL_IB_HCA", "mlx5", "compute adapters; list them as =mlx5_0,... where storage adapters share the prefix"),
    ),
    "h800-roce": (
        *ALWAYS,
        *LARGE_FABRIC,
        ("NCCL_IB_HCA", "mlx5_bond", "the bonded 400G adapters mlx5_bond_1..8"),
        ("NCCL_IB_GID_INDEX", "3", "RoCE v2 addresses; NCCL before 2.21 does not find the index itself"),
        ("NCCL_IB_TC", "160", "lossless traffic class of the usual H800 fabric; ask the site for its own"),
        ("NCCL_IB_SL", "3", "service level that goes with that class"),
        (
            "NCCL_IB_QPS_PER_CONNECTION",
            "4",
            "several queue pairs, so that ECMP spreads one connection over both bonded ports",
        ),
    ),
    "h800-ndr-infiniband": (
        *ALWAYS,
        *LARGE_FABRIC,
        ("NCCL_IB_HCA", "mlx5", "compute adapters; list them as =mlx5_0,... where storage adapters share the prefix"),
    ),
}


def environment(profile: dict, ranks_here: int) -> list[tuple[str, str, str]]:
    """Variables that the profile's site adds for the ranks: its network's table, then the device,
    then its own ``environment``."""
    found = fabric(adapters()) if profile["network"] == "auto" else ()
    lines = {name: (name, value, reason) for name, value, reason in (*NETWORKS[profile["network"]], *found)}
    if profile["device"] == "cpu" or (profile["device"] == "auto" and _gpus_here() < ranks_here):
        reason = (
            "the profile says so"
            if profile["device"] == "cpu"
            else f"this machine has {_gpus_here()} GPUs for {ranks_here} ranks"
        )
        lines["CUDA_VISIBLE_DEVICES"] = ("CUDA_VISIBLE_DEVICES", "", f"ranks run on the CPU: {reason}")
    for name, value in profile["environment"].items():
        lines[name] = (name, value, f"profile {profile['name']}")
    return list(lines.values())


def fabric(found: list[dict]) -> list[tuple[str, str, str]]:
    """What ``auto`` adds for the RDMA adapters of this node (launcher.slurm.node_probe.adapters),
    taking the job's other nodes to be alike.

    RoCE needs no more than InfiniBand here: NCCL finds the address index itself from 2.21 on, and a
    traffic class can't be guessed.
    """
    active = [one for one in found if one["active"]]
    if not active:
        return []
    top = max(one["gbps"] for one in active)
    fast, slow = ([one["name"] for one in active if (one["gbps"] == top) is wanted] for wanted in (True, False))
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
