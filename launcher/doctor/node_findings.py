"""What doctor found on a compute node (the JSON of launcher/slurm/node_probe.py), and what follows.
Reads slurm/networks, nothing else."""

from __future__ import annotations

import re

from launcher.config.gpus import model_of, rated
from launcher.doctor.machine_findings import ports
from launcher.doctor.slurm_findings import Finding
from launcher.slurm import network, site_files

TE_FROM, TE_BELOW = (2, 9), (2, 12)
"""Versions of Transformer Engine that megatron-core 0.16.1 accepts (its metadata:
>=2.9.0a0,<2.12.0)."""
CORE = "0.16.1"


def of_node(facts: dict) -> list[Finding]:
    """Shared folder, driver, GPUs, torch, NCCL, packages, fabric, host name and ports of a node."""
    where = f"Node {facts['host']}"
    return [
        *_canary(where, facts["canary"]),
        *_lock(where, facts["canary"], facts.get("lock")),
        *_gpus(where, facts),
        *_torch(where, facts),
        _core(where, facts["packages"]),
        _engine(where, facts["packages"]),
        _apex(where, facts["apex"]),
        _flash(where, facts["packages"]),
        *_fabric(where, facts),
        *_name(where, facts),
        *_memory(where, facts),
        ports(where, *facts["ports"]),
    ]


def _canary(where: str, canary: str | None) -> list[Finding]:
    if canary is None:
        return []
    if canary == "seen":
        return [
            Finding(
                where, "shared folder", "seen", "the node reads what was just written here: runs can lie in this folder"
            )
        ]
    return [
        Finding(
            where,
            "shared folder",
            canary,
            "the node does not see this folder: nothing that is submitted from here can run; work in a shared one",
            "bad",
        )
    ]


def _lock(where: str, canary: str | None, lock: str | None) -> list[Finding]:
    """The lock that doctor held on the canary meanwhile."""
    if canary != "seen" or lock is None:
        return []
    if lock == "held":
        return [
            Finding(
                where,
                "locks",
                "seen",
                "a lock that is taken here holds on the node, too: one run is never started twice",
            )
        ]
    if lock == "free":
        return [
            Finding(
                where,
                "locks",
                "of each host alone",
                "the node does not see a lock that is taken here (Lustre's -o "
                "localflock, BeeGFS without tuneUseGlobalFileLocks): give commands for "
                "a run on one login node only, or ask the site for locks between hosts",
                "bad",
            )
        ]
    return [Finding(where, "locks", lock, "a lock can't be tried there", "note")]


def _gpus(where: str, facts: dict) -> list[Finding]:
    if not facts["driver"]:
        return [
            Finding(
                where,
                "driver",
                "none",
                'no nvidia-smi here: ranks run on the CPU only (device = "cpu")',
                "note",
                {"device": "cpu"},
            )
        ]
    findings, gpus = [Finding(where, "driver", facts["driver"], "NVIDIA's")], facts["gpus"]
    memory = f", {gpus[0]['memory_gb']} GiB" if gpus and gpus[0]["memory_gb"] else ""
    names = f"{len(gpus)} x {gpus[0]['name']}{memory}" if gpus else "none"
    key = rated(gpus[0]["name"]) if gpus else ""
    settings = {"gpu": key} if key else {}
    findings.append(Finding(where, "GPUs", names, "as many as doctor's own job was given", "ok", settings))
    if any(gpu["mig"] for gpu in gpus):
        findings.append(
            Finding(
                where, "MIG", "on", "the GPUs are split, and NCCL can't connect the parts: ask for whole ones", "bad"
            )
        )
    if busy := [gpu["used_mb"] for gpu in gpus if gpu["ours"] and gpu["used_mb"] > 1000]:
        findings.append(
            Finding(
                where,
                "GPU memory",
                f"{busy[0]} MiB used",
                "another's process is on this GPU: a stage may run out of memory",
                "bad",
            )
        )
    return findings


def _torch(where: str, facts: dict) -> list[Finding]:
    torch = facts["torch"]
    if "error" in torch:
        return [
            Finding(
                where,
                "torch",
                torch["error"],
                "no stage can run with this interpreter: install the project there, or use its image (slurm/container)",
                "bad",
            )
        ]
    value = f"{torch['version']}, CUDA {torch['cuda'] or 'none'}"
    if torch["available"]:
        findings = [Finding(where, "torch", value, "sees the GPUs")]
    elif facts["driver"]:
        findings = [
            Finding(
                where,
                "torch",
                value,
                "can't use the node's GPUs: a CPU build, or its CUDA is newer than the driver",
                "bad",
            )
        ]
    else:
        findings = [Finding(where, "torch", value, "ranks run on the CPU")]
    if torch["gpus"]:
        memory = round(torch["gpus"][0][1] / 1e9, 1)
        findings.append(
            Finding(
                where,
                "memory of a GPU",
                f"{memory} GB",
                "plan holds its estimates against it",
                "ok",
                {"gpu_memory_gb": memory},
            )
        )
    if torch["nccl"]:
        old = tuple(int(part) for part in torch["nccl"].split(".")[:2]) < (2, 21)
        note = (
            "does not find the RoCE address by itself: NCCL_IB_GID_INDEX has to be set"
            if old
            else "finds the RoCE address by itself"
        )
        findings.append(Finding(where, "NCCL", torch["nccl"], note, "note" if old else "ok"))
    return findings


def _core(where: str, have: dict) -> Finding:
    version = have.get("megatron-core", "")
    if version == CORE:
        return Finding(where, "megatron-core", version, "the version that this release is made for")
    return Finding(
        where,
        "megatron-core",
        version or "none",
        f"this release is made for {CORE}: pip install megatron-core=={CORE}",
        "bad",
    )


def _engine(where: str, have: dict) -> Finding:
    version = have.get("transformer-engine", "")
    if not version:
        return Finding(
            where,
            "Transformer Engine",
            "none",
            'not needed: norms and AdamW are torch\'s unless a stage says fused = "te"',
        )
    number = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    if TE_FROM <= number < TE_BELOW:
        return Finding(where, "Transformer Engine", version, f"a version that megatron-core {CORE} accepts")
    return Finding(
        where,
        "Transformer Engine",
        version,
        f"megatron-core {CORE} accepts >=2.9,<2.12 only: pip install "
        "--no-build-isolation 'transformer-engine[pytorch]==2.11.0', or uninstall it",
        "bad",
    )


def _apex(where: str, apex: dict) -> Finding:
    if apex["kind"] == "absent":
        return Finding(
            where, "apex", "none", 'not needed: norms and AdamW are torch\'s unless a stage says fused = "apex"'
        )
    value = f"{apex['version'] or 'no version'} in {apex['where']}"
    if apex["kind"] == "other":
        about = f" ({apex['summary']})" if apex["summary"] else ""
        return Finding(
            where,
            "apex",
            value,
            f"not NVIDIA's{about}, but megatron-core would import it by its name: pip uninstall apex; "
            "NVIDIA's is built from github.com/NVIDIA/apex (slurm/container does)",
            "bad",
        )
    if not apex["extensions"]:
        return Finding(
            where,
            "apex",
            f"NVIDIA's, {value}, Python only",
            "built without its CUDA extensions, it speeds nothing up: build it with --cpp_ext --cuda_ext",
            "note",
        )
    return Finding(
        where, "apex", f"NVIDIA's, {value}: {', '.join(apex['extensions'])}", 'used where a stage says fused = "apex"'
    )


def _flash(where: str, have: dict) -> Finding:
    return Finding(
        where, "flash-attn", have.get("flash-attn", "none"), "not needed: ALiBi attention runs on torch's own kernels"
    )


def _fabric(where: str, facts: dict) -> list[Finding]:
    """The RDMA adapters that are active; the slower ones are taken to serve storage."""
    fast = [one for one in facts["adapters"] if one["active"]]
    if not fast:
        return [
            Finding(where, "fabric", "no RDMA adapter", "ranks on several nodes talk over TCP: slow, but right", "note")
        ]
    top = max(one["gbps"] for one in fast)
    chosen, slower = (
        [one["name"] for one in fast if (one["gbps"] == top) is is_fastest] for is_fastest in (True, False)
    )
    layer = next(one["layer"] for one in fast if one["gbps"] == top)
    settings: dict = {"network": _network_name(layer, top, [gpu["name"] for gpu in facts["gpus"]])}
    if slower:
        settings["environment"] = {"NCCL_IB_HCA": "=" + ",".join(chosen)}
    slower_note = f"; {', '.join(slower)} is slower (storage?) and left out" if slower else ""
    findings = [
        Finding(
            where, "fabric", f"{layer} {top} Gb/s: {', '.join(chosen)}", f"NCCL uses it{slower_note}", "ok", settings
        )
    ]
    if 0 <= facts["locked_memory"] < 2**30:
        findings.append(
            Finding(
                where,
                "locked memory",
                f"{facts['locked_memory'] // 1024} KiB",
                "RDMA needs it unlimited, NCCL fails without: ask the site for PropagateResourceLimitsExcept=MEMLOCK",
                "bad",
            )
        )
    return findings


def _network_name(layer: str, gbps: int, gpus: list[str]) -> str:
    """Name of the file in slurm/networks that fits the node; "auto" where none does."""
    models = [model_of(name) for name in gpus]
    fitting = (name for name in site_files.names("networks") if network.named(name).fits.node(layer, gbps, models))
    return next(fitting, "auto")


def _name(where: str, facts: dict) -> list[Finding]:
    """Whether the host's name means an address that other nodes reach."""
    if facts["address"] and not facts["address"].startswith("127."):
        return []
    choice = facts["interfaces"][0] if facts["interfaces"] else "eth0"
    return [
        Finding(
            where,
            "host name",
            facts["address"] or "does not resolve",
            "gloo takes the address of the host's name, which others "
            f'can\'t reach: environment = {{ GLOO_SOCKET_IFNAME = "{choice}" }} where a stage has several nodes',
            "note",
        )
    ]


def _memory(where: str, facts: dict) -> list[Finding]:
    if facts["shm_gb"] >= 1:
        return []
    return [
        Finding(
            where,
            "/dev/shm",
            f"{facts['shm_gb']} GiB",
            "too small: NCCL passes data between the GPUs of a node through it",
            "bad",
        )
    ]
