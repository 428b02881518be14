"""A site: what slurm/clusters/<name>.toml may say. Standard library only; ``python -m launcher
doctor --write`` makes such a file."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import ClassVar

from launcher.config.addresses import refuse_secrets
from launcher.config.environment import KEYS, fixed
from launcher.config.gpus import GPUS
from launcher.config.network import Network
from launcher.config.sbatch import SbatchOptions, one_line
from training.config.schema import build

RUNTIMES = ("none", "pyxis", "apptainer")
GPU_OPTIONS = ("gpus-per-node", "gres", "none")


@dataclass(frozen=True, kw_only=True)
class Container:
    """Table ``[container]`` of a profile: what the ranks run in. Supervise itself runs on the node,
    outside it."""

    runtime: str = "none"
    """"none", "pyxis" (srun's --container-image, with enroot) or "apptainer"."""
    image: str = ""
    """pyxis: a .sqsh file or registry reference (nvcr.io#nvidia/pytorch:TAG); apptainer: a .sif
    file or docker:// reference."""
    mounts: list = field(default_factory=list)
    """Folders that the ranks see, "/data" or "/data:/data:ro"; the working directory of the run is
    always one."""
    python: str = "python"
    """The interpreter inside the image."""

    def __post_init__(self):
        if self.runtime not in RUNTIMES:
            raise ValueError(f"runtime = {self.runtime!r}: expected one of {', '.join(RUNTIMES)}")
        if self.runtime != "none" and not self.image:
            raise ValueError(
                f"image = '': runtime = {self.runtime!r} needs the "
                "image that slurm/container makes, a path or a reference"
            )
        if not self.python:
            raise ValueError("python = '': expected the interpreter inside the image, e.g. \"python\"")
        for value in (self.image, self.python, *self.mounts):
            one_line("image, python and mounts", value)
        for mount in self.mounts:
            if not re.fullmatch(r"/[^:,]*(:/[^:,]*(:(ro|rw))?)?", mount):
                raise ValueError(
                    f"mounts holds {mount!r}: expected an absolute path, SOURCE:TARGET, or SOURCE:TARGET:ro; no commas"
                )


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Table ``[machine]`` of a profile: one GPU and what connects it, datasheet rates, one
    direction, for ``plan --suggest``.

    0: the rate of the profile's ``gpu`` or, outside the node, of its ``network``.
    """

    tflops: float = 0.0
    """Peak in bf16, Tflop/s."""
    memory_gb_s: float = 0.0
    """Of its own memory, GB/s."""
    inside_gb_s: float = 0.0
    """To the other GPUs of its node, GB/s."""
    outside_gb_s: float = 0.0
    """Its part of the node's network, GB/s."""

    def __post_init__(self):
        for name, value in vars(self).items():
            if not 0 <= value < math.inf or 0 < value < 0.001:
                raise ValueError(
                    f"{name} = {value:g}: expected a rate of at least 0.001, or 0 for the rate of gpu or network"
                )


@dataclass(frozen=True, kw_only=True)
class Profile(SbatchOptions):
    """A site: slurm/clusters/<name>.toml."""

    of_profile: ClassVar[str] = ""

    name: str
    scheduler: str
    """"slurm", or "local": the stages run here, in order."""
    slurm: str = ""
    """Slurm's version there, e.g. "23.11.4"; found when the chain is submitted where it stands
    empty. Scripts are rendered for it."""
    device: str = "cuda"
    """"cuda", "cpu" (GPUs are hidden from the ranks), or "auto": cuda where this machine has a GPU
    for each rank."""
    network: str = "auto"
    """Name of a file in slurm/networks, without .toml, or of a file next to the profile,
    "mine-network.toml"."""
    network_table: Network = field(default_factory=Network)
    """What that file says; the launcher fills it in when it loads the profile."""
    gpu: str = ""
    """Model of the GPUs, whose datasheet rates ``plan`` takes: "a100", "h100", "h200" or "h800"."""
    gpu_option: str = "gpus-per-node"
    """How GPUs are asked for: "gpus-per-node", "gres" (Slurm before 19.05, or select/cons_res),
    "none" (no GPU GRES: whole nodes)."""
    gpu_type: str = ""
    """Type in the site's GRES, e.g. "a100" of gpu:a100:8; empty takes any."""
    gpus_per_node: int = 8
    """GPUs of a node."""
    gpu_memory_gb: float = 0.0
    """Memory of a GPU as torch reports it, GB (1e9 bytes), which ``plan`` holds its estimate
    against; 0 where it isn't known."""
    mem_gb: int = 0
    """Memory of a node, GiB: a part of a node asks for its GPUs' share, a whole one for all; 0
    leaves it to the partition's default."""
    max_nodes: int = 1
    """Most nodes of one job."""
    max_minutes: int = 1440
    """Longest job, minutes."""
    exclusive: bool = False
    """Ask for whole nodes when a stage uses all their GPUs."""
    signal_lead_s: int = 300
    """Seconds before the time limit at which the job is told to save; at most a quarter of the
    limit is used."""
    preflight_s: int = 90
    """Seconds for a node's check, else it is a bad one; the checks of its GPUs get twice that."""
    preflight: bool = True
    """Check the nodes (shared folder, clock, disk, network; GPUs where there are any) before the
    ranks start: seconds."""
    node_check: str = ""
    """The site's own check: a shell command run on each node before the ranks; a non-zero exit
    makes the node a bad one."""
    max_attempts: int = 20
    """Attempts of a stage since it was last submitted or resumed; then it fails instead of queueing
    itself again."""
    stall_minutes: int = 60
    """Minutes without a line, a metric or a checkpoint of any rank after which a stage counts as
    hung and is ended."""
    setup: list = field(default_factory=list)
    """Shell lines before the stage starts, e.g. "module load cuda/12.4"."""
    modules: list = field(default_factory=list)
    """Modules to load before ``setup``, e.g. ["cuda/12.4", "nccl"]."""
    environment: dict = field(default_factory=dict)
    """Environment variables of the ranks; they win over the network's table. No keys: they are
    printed in the log."""
    pass_environment: list = field(default_factory=list)
    """Variables of your shell that jobs get after all: ["SBATCH_ACCOUNT", "SLURM_MPI_*"]."""
    secrets: str = ""
    """File of KEY=VALUE lines that only you can read (chmod 600); the ranks get them, nothing else
    does."""
    machine: Machine = field(default_factory=Machine)
    container: Container = field(default_factory=Container)

    def __post_init__(self):
        refuse_secrets(vars(self), "profile")
        for name, kind in (("machine", Machine), ("network_table", Network), ("container", Container)):
            # a profile that was read back from a run's config.json
            if isinstance(table := getattr(self, name), dict):
                object.__setattr__(self, name, build(kind, table, name))
        for name, allowed in (
            ("scheduler", ("local", "slurm")),
            ("device", ("auto", "cpu", "cuda")),
            ("gpu_option", GPU_OPTIONS),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} = {getattr(self, name)!r}: expected one of {', '.join(allowed)}")
        if self.gpu and self.gpu not in GPUS:
            raise ValueError(
                f"gpu = {self.gpu!r}: expected one of {', '.join(GPUS)}; for another leave it out and give its rates "
                "in the table [machine]"
            )
        self._check_lines()
        for name, least in (
            ("gpus_per_node", 0),
            ("mem_gb", 0),
            ("gpu_memory_gb", 0),
            ("max_nodes", 1),
            ("max_minutes", 1),
            ("signal_lead_s", 1),
            ("preflight_s", 10),
        ):
            if not least <= getattr(self, name) < math.inf:  # nan neither
                raise ValueError(f"{name} = {getattr(self, name)}: expected at least {least}")
        self.check_sbatch_options()
        if self.scheduler == "local" and self.container.runtime != "none":
            raise ValueError(
                f'container.runtime = {self.container.runtime!r}: with scheduler = "local" start the launcher itself '
                "inside the image: apptainer exec IMAGE python -m launcher ..."
            )

    def _check_lines(self) -> None:
        """What becomes a line of a script stays one, and no key stands in it."""
        for value in (*self.setup, *self.environment, *self.environment.values()):
            if not isinstance(value, str):
                raise ValueError(f"setup and environment hold strings, got {value!r}; put it in quotes")
        for name, value in self.environment.items():
            if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
                raise ValueError(f"environment.{name}: expected a name of letters, digits and '_'")
            one_line(f"environment.{name}", value)
            if KEYS.search(name):
                raise ValueError(
                    f"environment.{name}: the profile is stored with each run and its environment printed in the log; "
                    "put the line into a file that only you can read, and its path here: secrets = "
                    '"~/.config/convoy.env"'
                )
        for line in self.setup:
            for name in filter(KEYS.search, re.findall(r"\b(\w+)=", line)):
                raise ValueError(
                    f"setup sets {name}: setup is a part of each batch script; put the variable into a file that only "
                    'you can read, and its path here: secrets = "~/.config/convoy.env"'
                )
        for name in self.pass_environment:
            if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*\*?", name):
                raise ValueError(
                    f"pass_environment holds {name!r}: expected names of variables, e.g. "
                    '"SBATCH_ACCOUNT"; the last character may be *'
                )
            if fixed_by := fixed(name):
                raise ValueError(
                    f"pass_environment holds {name!r}: {fixed_by} would change what the launcher reads from "
                    "Slurm, or how ranks meet and end; leave it out"
                )
        for module in self.modules:
            one_line("modules", module)
        for name in ("gpu_type", "secrets", "slurm"):
            one_line(name, getattr(self, name))

    def whole_node(self, gpus: int) -> bool:
        """Whether a job with ``gpus`` GPUs of each node gets all that a node has."""
        return bool(gpus) and (self.gpu_option == "none" or (self.exclusive and gpus == self.gpus_per_node))

    def share_gib(self, gpus: int) -> int:
        """GiB of a node's memory that a job with ``gpus`` of its GPUs asks for; 0 where ``mem_gb``
        is not said."""
        if not self.mem_gb or self.whole_node(gpus):
            return self.mem_gb
        return max(1, self.mem_gb * max(1, gpus) // max(1, self.gpus_per_node))

    @property
    def passed(self) -> tuple[str, ...]:
        """Variables that a site wants after all: ``pass_environment``, and what ``setup`` sets."""
        assigned = (name for line in self.setup for name in re.findall(r"\b([A-Za-z_]\w*)=", line))
        return (*self.pass_environment, *assigned)

    @property
    def version(self) -> tuple[int, int]:
        """(22, 5) of "22.05.8"; (0, 0) where it isn't known."""
        match = re.search(r"(\d+)\.(\d+)", self.slurm)
        return (int(match[1]), int(match[2])) if match else (0, 0)
