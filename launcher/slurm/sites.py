"""A site's profile from slurm/clusters/*.toml, and whether a request fits it."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

from launcher.config import key_file
from launcher.config.sections import Profile, Resources, near, read_toml
from launcher.slurm import commands, network, site_files
from training.config.schema import build
from training.errors import ConfigError

DEV_CLUSTER = "convoy-dev"
"""ClusterName of the cluster that slurm/dev/up starts."""
VARIABLE = "CONVOY_PROFILE"
"""Environment variable that names the profile where no option does."""


CLUSTERS = site_files.slurm_folder() / "clusters"


def load(name: str) -> Profile:
    """The profile of a file when ``name`` ends in .toml, else of ./slurm/clusters or of the
    installed ones; ConfigError with the fix."""
    path = site_files.find("clusters", name)
    if path is None:
        known = site_files.names("clusters")
        raise ConfigError(
            f"--profile {name}: no file {site_files.candidates('clusters', name)[0]}{near(name, known)}; there are: "
            f"{', '.join(known)}; a site of your own goes by its path, "
            "mine.toml (python -m launcher doctor --write mine.toml makes one)"
        )
    tables = read_toml(path)
    if "network_table" in tables:
        raise ConfigError(f"{path}: network_table is filled by the launcher from the network's file; remove it")
    profile = build(Profile, {"name": path.stem, **tables}, f"profile {path.stem}")
    profile = dataclasses.replace(profile, network_table=network.load(profile.network, path))
    key_file.names(profile)
    return profile


def choose(name: str | None) -> tuple[Profile, str]:
    """The profile and why it was chosen: as named, else the one that is remembered, else dev on
    the development cluster, else local.

    ConfigError on a cluster's login node without a name: many centres forbid to train there.
    """
    if name:
        return _versioned(load(name)), "as asked"
    name, where = remembered()
    if name:
        try:
            return _versioned(load(name)), where
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from None
    reason = commands.unusable()
    if not commands.login_node(reason):
        return load("local"), reason
    site = None if reason else commands.site()
    if site and site.cluster == DEV_CLUSTER:
        why = f"SLURM_CONF is the cluster of slurm/dev/up ({site.cluster})"
        return dataclasses.replace(load("dev"), slurm=site.version), why
    what = f"cluster {site.cluster}" if site else f"a cluster whose controller does not answer ({reason})"
    raise ConfigError(
        f"this is a machine of {what}, and no --profile says where to run: on the cluster by a profile of it: "
        f"--profile FILE.toml "
        f"(python -m launcher doctor --write FILE.toml makes one); or on this machine: --profile local. To be asked "
        f"no more: "
        f'export {VARIABLE}=FILE.toml, or the line profile = "FILE.toml" in {config_file()}'
    )


def config_file() -> Path:
    """The person's own settings; one key: ``profile``."""
    return Path(os.environ.get("XDG_CONFIG_HOME") or "~/.config").expanduser() / "convoy.toml"


def remembered() -> tuple[str, str]:
    """The profile to use where none is named, and where that is written; ("", "") where it is
    not. The variable wins over the file."""
    if name := os.environ.get(VARIABLE):
        return name, f"${VARIABLE} = {name}"
    path = config_file()
    if not path.is_file():
        return "", ""
    values = read_toml(path)
    if set(values) - {"profile"} or not isinstance(values.get("profile", ""), str):
        raise ConfigError(f'{path}: {values}: expected one line, profile = "NAME", or "/FOLDER/FILE.toml"')
    name = values.get("profile", "")
    beside = path.parent / Path(name).expanduser()
    return (str(beside) if name.endswith(".toml") and beside.is_file() else name), f"{path}: profile = {name!r}"


def _versioned(profile: Profile) -> Profile:
    """With the version of the Slurm that is here, where the profile names none: scripts are
    rendered for it."""
    if profile.scheduler != "slurm" or profile.slurm or commands.unusable():
        return profile
    return dataclasses.replace(profile, slurm=commands.site().version)


def check_fits(profile: Profile, stage: str, resources: Resources) -> None:
    """ConfigError when the site can't give what the stage asks for."""
    for have, limit, key in (
        (resources.gpus_per_node, profile.gpus_per_node, "gpus_per_node"),
        (resources.nodes, profile.max_nodes, "nodes"),
        (resources.minutes, profile.max_minutes, "minutes"),
    ):
        if have > limit:
            raise ConfigError(
                f"resources.{stage}.{key} = {have}: profile {profile.name} gives at most {limit}; "
                f"set --set resources.{stage}.{key}={limit} or less, or another --profile"
            )
    if resources.nodes + resources.spares > profile.max_nodes:
        left = profile.max_nodes - resources.nodes
        raise ConfigError(
            f"resources.{stage}.spares = {resources.spares}: with {resources.nodes} nodes that is more than the "
            f"{profile.max_nodes} that profile {profile.name} gives; set --set resources.{stage}.spares={left} or less"
        )
