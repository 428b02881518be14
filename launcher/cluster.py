"""A site's profile from slurm/clusters/*.toml, and whether a request fits it."""

from __future__ import annotations

from pathlib import Path

from launcher import probe
from launcher.config import Profile, Resources, read_toml
from launcher.nccl import NETWORKS
from training.config import ConfigError, build

CLUSTERS = Path(__file__).parent.parent / "slurm" / "clusters"
DEV_CLUSTER = "convoy-dev"
"""ClusterName of the cluster that slurm/dev/up starts."""


def load(name: str) -> Profile:
    """The profile ``name`` of slurm/clusters, or of a file when it ends in .toml; ConfigError with the fix where it is bad."""
    path = Path(name) if name.endswith(".toml") else CLUSTERS / f"{name}.toml"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in CLUSTERS.glob("*.toml")))
        raise ConfigError(f"--profile {name}: no file {path}; there are: {known}; a site of your own goes by its path, mine.toml")
    profile = build(Profile, {"name": path.stem, **read_toml(path)}, f"profile {path.stem}")
    if profile.network not in NETWORKS:
        raise ConfigError(f"{path}: network = {profile.network!r}: expected one of {', '.join(NETWORKS)}")
    return profile


def choose(name: str | None) -> tuple[Profile, str]:
    """The profile and why it was chosen: as named, else dev on the development cluster, else local."""
    if name:
        return load(name), "as asked"
    if reason := probe.unusable():
        return load("local"), reason
    cluster = probe.site().cluster
    if cluster == DEV_CLUSTER:
        return load("dev"), f"SLURM_CONF is the cluster of slurm/dev/up ({cluster})"
    return load("local"), f"cluster {cluster} has no profile of its own; to use it: --profile a100 (see slurm/clusters)"


def check_fits(profile: Profile, stage: str, asked: Resources) -> None:
    """ConfigError when the site can't give what the stage asks for."""
    for have, limit, key in ((asked.gpus_per_node, profile.gpus_per_node, "gpus_per_node"), (asked.nodes, profile.max_nodes, "nodes"),
                             (asked.minutes, profile.max_minutes, "minutes")):
        if have > limit:
            raise ConfigError(f"resources.{stage}.{key} = {have}: profile {profile.name} gives at most {limit}; "
                              f"set --set resources.{stage}.{key}={limit} or less, or another --profile")
