"""What this node has, as one JSON object on standard output. Standard library only, and no import
of ours: ``doctor --node`` sends this file through srun to the standard input of a compute node's
interpreter, which need not see our folders or have our packages.

    python launcher/slurm/node_probe.py [CANARY WORD]

CANARY: a file that the login node has just written WORD into; seen here, the folder is shared.
"""

import fcntl
import importlib.metadata
import importlib.util
import json
import os
import platform
import resource
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

PACKAGES = ("torch", "megatron-core", "transformer-engine", "flash-attn", "transformers", "numpy")
TORCH = """import json, torch
cuda = torch.version.cuda
print(json.dumps({"version": torch.__version__, "cuda": cuda, "available": torch.cuda.is_available(),
                  "nccl": ".".join(map(str, torch.cuda.nccl.version())) if cuda else None,
                  "gpus": [[torch.cuda.get_device_name(i), torch.cuda.get_device_properties(i).total_memory,
                            list(torch.cuda.get_device_capability(i))] for i in range(torch.cuda.device_count())]}))"""
TORCH_S = 180
"""Seconds for the import of torch: from a cold network file system it reads gigabytes."""
APEX_EXTENSIONS = ("amp_C", "fused_layer_norm_cuda", "fused_weight_gradient_mlp_cuda", "scaled_masked_softmax_cuda")


def main(arguments: list[str]) -> dict:
    low, high = (int(number) for number in Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    return {
        "host": os.environ["SLURMD_NODENAME"] if "SLURMD_NODENAME" in os.environ else socket.gethostname(),
        "python": sys.executable,
        "python_version": platform.python_version(),
        "time": time.time(),
        "gpus": gpus(),
        "driver": driver(),
        "torch": torch(),
        "apex": apex(),
        "adapters": adapters(),
        "packages": {name: version for name in PACKAGES if (version := version_of(name))},
        "address": address(),
        "interfaces": interfaces(),
        "ports": [low, high],
        "memory_gb": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**30,
        "cores": len(os.sched_getaffinity(0)),
        "locked_memory": resource.getrlimit(resource.RLIMIT_MEMLOCK)[1],
        "shm_gb": shutil.disk_usage("/dev/shm").total // 2**30,
        "programs": {name: path for name in ("enroot", "apptainer", "singularity") if (path := shutil.which(name))},
        "canary": None if not arguments else canary(*arguments),
        "lock": None if not arguments else lock(arguments[0]),
    }


def lock(path: str) -> str:
    """Whether the lock that the login node holds on ``path`` is seen here: "held", "free", or why
    it can't be told."""
    try:
        with open(path, "a", encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return "held"
    except OSError as error:
        return error.strerror or "no answer"
    return "free"


def apex(find=importlib.util.find_spec, distribution=importlib.metadata.metadata) -> dict:
    """Which ``apex`` would be imported: {"kind": "absent" | "nvidia" | "other", "where", "version",
    "extensions"}.

    Decided by its files and metadata, never by importing it: the project of this name on PyPI is a
    web toolkit for Pyramid.
    """
    spec = find("apex")
    if spec is None:
        return {"kind": "absent", "where": "", "version": "", "extensions": []}
    where = Path(next(iter(spec.submodule_search_locations))) if spec.submodule_search_locations else Path(spec.origin)
    try:
        about = distribution("apex")
        version, summary = about["Version"], about["Summary"] or ""
    except importlib.metadata.PackageNotFoundError:  # a folder on the path, not an installation
        version, summary = "", ""
    own = any((where / name).is_file() for name in ("optimizers/fused_adam.py", "normalization/fused_layer_norm.py"))
    extensions = [name for name in APEX_EXTENSIONS if own and find(name)]
    return {
        "kind": "nvidia" if own else "other",
        "where": str(where),
        "version": version,
        "summary": summary,
        "extensions": extensions,
    }


def adapters(root: Path = Path("/sys/class/infiniband")) -> list[dict]:
    """RDMA adapters: [{"name": "mlx5_0", "layer": "InfiniBand" | "Ethernet", "gbps": 200, "active":
    True}], by name."""
    parts = []
    for port in sorted(root.glob("*/ports/1")) if root.is_dir() else []:
        layer, rate, state = (_line(port / name) for name in ("link_layer", "rate", "state"))
        parts.append(
            {
                "name": port.parent.parent.name,
                "layer": layer,
                "gbps": int(float(rate.split()[0])) if rate else 0,
                "active": "ACTIVE" in state,
            }
        )
    return parts


def interfaces() -> list[str]:
    """Network interfaces that are up and lead out of this machine."""
    names = []
    for path in sorted(Path("/sys/class/net").iterdir()):
        inner = path.name == "lo" or path.name.startswith(("docker", "virbr", "veth", "br-", "cni", "podman"))
        if not inner and _line(path / "operstate") in ("up", "unknown"):
            names.append(path.name)
    return names


def address() -> str:
    """The address that this host's name means here; empty where it resolves to none."""
    try:
        return socket.gethostbyname(socket.gethostname())
    except OSError:
        return ""


def gpus() -> list[dict]:
    """GPUs that the driver shows: [{"name", "memory_gb", "mig", "used_mb", "ours"}].

    0 GB or MB: it does not say. ``ours``: not another job's, as far as CUDA_VISIBLE_DEVICES tells.
    """
    fields = "index,uuid,name,memory.total,mig.mode.current,memory.used"
    text = _output("nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits")
    return gpu_rows(text, os.environ.get("CUDA_VISIBLE_DEVICES", ""))


def gpu_rows(text: str, visible: str) -> list[dict]:
    rows = [[part.strip() for part in line.split(",")] for line in text.splitlines() if line.count(",") == 5]
    names = [name.strip() for name in visible.split(",") if name.strip()]
    own = [
        row
        for row in rows
        if any(name == row[0] or (name.startswith("GPU-") and row[1].startswith(name)) for name in names)
    ]
    own = own if len(own) == len(names) > 0 else rows
    return [
        {
            "name": row[2],
            "memory_gb": round(_number(row[3]) / 1024),
            "mig": row[4] == "Enabled",
            "used_mb": _number(row[5]),
            "ours": row in own,
        }
        for row in rows
    ]


def _number(text: str) -> int:
    """0 for "[N/A]": a GPU that shares the host's memory, some virtual ones."""
    return int(text) if text.isdecimal() else 0


def driver() -> str:
    """Version of NVIDIA's driver, and the newest CUDA that it runs; empty without one."""
    lines = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").splitlines()
    return lines[0].strip() if lines else ""


def torch() -> dict:
    """What torch says of itself and its GPUs, from a process of its own; {"error": ...} where its
    import fails."""
    if importlib.util.find_spec("torch") is None:
        return {"error": "not installed"}
    try:
        done = subprocess.run(
            [sys.executable, "-c", TORCH], capture_output=True, text=True, timeout=TORCH_S, check=False
        )
    except subprocess.TimeoutExpired:
        return {"error": f"import took more than {TORCH_S} s"}
    return (
        json.loads(done.stdout)
        if done.returncode == 0
        else {"error": (done.stderr.strip() or "no message").splitlines()[-1]}
    )


def version_of(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def canary(path: str, word: str) -> str:
    """ "seen" where this node reads what the login node wrote; else why not."""
    try:
        return "seen" if Path(path).read_text() == word else "another file of this name is here"
    except OSError as error:
        return error.strerror or str(error)


def _output(*command: str) -> str:
    """Standard output of a command; empty where there is no such command or it fails."""
    if shutil.which(command[0]) is None:
        return ""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except subprocess.TimeoutExpired:
        return ""
    return done.stdout if done.returncode == 0 else ""


def _line(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


if __name__ == "__main__" and {"-h", "--help"} & set(sys.argv[1:]):
    print(__doc__)
    sys.exit(0)
if __name__ == "__main__":
    print("CONVOY-NODE " + json.dumps(main(sys.argv[1:])))
