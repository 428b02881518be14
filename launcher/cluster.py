"""A site's profile from slurm/clusters/*.toml, and whether a request fits it."""

from __future__ import annotations

import dataclasses
import sysconfig
from pathlib import Path

from launcher import probe, secrets
from launcher.config import Profile, Resources, read_toml
from launcher.nccl import NETWORKS
from training.settings import ConfigError, build

DEV_CLUSTER = "convoy-dev"
"""ClusterName of the cluster that slurm/dev/up starts."""


def slurm_folder() -> Path:
    """The folder slurm/: beside the packages in a source tree; below share/convoy where a wheel was installed."""
    beside = Path(__file__).parent.parent
    installed = [Path(sysconfig.get_path("data", scheme)) for scheme in (sysconfig.get_default_scheme(), "posix_user")]
    places = [beside / "slurm", *(folder / "share" / "convoy" / "slurm" for folder in (beside, *installed))]
    return next((place for place in places if (place / "clusters").is_dir()), places[0])


CLUSTERS = slurm_folder() / "clusters"


def load(name: str) -> Profile:
    """The profile of a file when ``name`` ends in .toml, else of ./slurm/clusters or of the installed ones; ConfigError with the fix."""
    folders = dict.fromkeys([Path("slurm/clusters").absolute(), CLUSTERS.absolute()])
    places = [Path(name).expanduser()] if name.endswith(".toml") else [folder / f"{name}.toml" for folder in folders]
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        known = ", ".join(sorted({file.stem for folder in folders for file in folder.glob("*.toml")}))
        raise ConfigError(f"--profile {name}: no file {places[0]}; there are: {known}; a site of your own goes by its path, mine.toml "
                          "(python -m launcher doctor --write mine.toml makes one)")
    profile = build(Profile, {"name": path.stem, **read_toml(path)}, f"profile {path.stem}")
    if profile.network not in NETWORKS:
        raise ConfigError(f"{path}: network = {profile.network!r}: expected one of {', '.join(NETWORKS)}")
    secrets.names(profile)
    return profile


def choose(name: str | None) -> tuple[Profile, str]:
    """The profile and why it was chosen: as named, else dev on the development cluster, else local."""
    if name:
        return _versioned(load(name)), "as asked"
    if reason := probe.unusable():
        return load("local"), reason
    found = probe.site()
    if found.cluster == DEV_CLUSTER:
        return dataclasses.replace(load("dev"), slurm=found.version), f"SLURM_CONF is the cluster of slurm/dev/up ({found.cluster})"
    return load("local"), (f"cluster {found.cluster} has no profile of its own; to use it: python -m launcher doctor --write mine.toml, "
                           "then --profile mine.toml")


def _versioned(profile: Profile) -> Profile:
    """With the version of the Slurm that is here, where the profile names none: scripts are rendered for it."""
    if profile.scheduler != "slurm" or profile.slurm or probe.unusable():
        return profile
    return dataclasses.replace(profile, slurm=probe.site().version)


def check_fits(profile: Profile, stage: str, asked: Resources) -> None:
    """ConfigError when the site can't give what the stage asks for."""
    for have, limit, key in ((asked.gpus_per_node, profile.gpus_per_node, "gpus_per_node"), (asked.nodes, profile.max_nodes, "nodes"),
                             (asked.minutes, profile.max_minutes, "minutes")):
        if have > limit:
            raise ConfigError(f"resources.{stage}.{key} = {have}: profile {profile.name} gives at most {limit}; "
                              f"set --set resources.{stage}.{key}={limit} or less, or another --profile")
    if asked.nodes + asked.spares > profile.max_nodes:
        left = profile.max_nodes - asked.nodes
        raise ConfigError(f"resources.{stage}.spares = {asked.spares}: with {asked.nodes} nodes that is more than the {profile.max_nodes} "
                          f"that profile {profile.name} gives; set --set resources.{stage}.spares={left} or less")
