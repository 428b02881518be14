"""A network: what slurm/networks/<name>.toml may say. Standard library only."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field

from launcher.config.environment import KEYS
from launcher.config.sbatch import one_line


@dataclass(frozen=True, kw_only=True)
class Fits:
    """Table ``[fits]``: the nodes for which ``doctor --node`` writes this network.

    Without GPUs it is written for none.
    """

    layer: str = ""
    """"InfiniBand" or "Ethernet": the link layer of the fastest adapter."""
    least_gbps: int = 0
    """Least rate of the fastest adapter, Gb/s."""
    most_gbps: int = 0
    """Highest rate of it, Gb/s; 0: any."""
    gpus: list = field(default_factory=list)
    """Models of GPU, e.g. ["h100", "h800"]."""

    def node(self, layer: str, gbps: int, models: list[str]) -> bool:
        """Whether a node has such an adapter and such GPUs."""
        right_rate = self.least_gbps <= gbps and (not self.most_gbps or gbps <= self.most_gbps)
        return layer == self.layer and right_rate and bool(set(models) & set(self.gpus))


@dataclass(frozen=True, kw_only=True)
class Network:
    """What connects the nodes of a site: variables of the ranks, and a rate for estimates."""

    outside_gb_s: float = 0.0
    """A GPU's part of the node's adapters, datasheet, one direction, GB/s; 0 where it is not
    known."""
    adapters: bool = False
    """Read the node's adapters when a job starts, and add the variables that they need."""
    variables: dict = field(default_factory=dict)
    """Variable of the ranks -> a table of its ``value`` and the ``reason`` for it, which the log
    shows."""
    fits: Fits = field(default_factory=Fits)

    def __post_init__(self):
        if not 0 <= self.outside_gb_s < math.inf:
            raise ValueError(f"outside_gb_s = {self.outside_gb_s}: expected a rate in GB/s, or 0 where it is not known")
        for name, line in self.variables.items():
            if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
                raise ValueError(f"variables.{name}: expected a name of letters, digits and '_'")
            if KEYS.search(name):
                raise ValueError(
                    f"variables.{name}: it is printed in the log; put it into the file that the profile's secrets name"
                )
            if not isinstance(line, dict) or set(line) != {"value", "reason"}:
                raise ValueError(f'variables.{name} = {line!r}: expected a table, {{ value = "...", reason = "..." }}')
            for key, text in line.items():
                one_line(f"variables.{name}.{key}", text)
