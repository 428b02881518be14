"""Ranks in a container: what is added to srun (pyxis, with enroot) or put before the command
(Apptainer). Pure text.

The batch script and supervise run on the node itself; they need Slurm's commands, which an image
does not have.
"""

from __future__ import annotations

import os
from pathlib import Path

from launcher import run_module
from launcher.config import environment
from launcher.config.profile import Profile
from training.errors import ConfigError


def srun_options(profile: Profile, environment=()) -> list[str]:
    """Options of srun for the profile's container; none without pyxis.

    ``environment``: names of variables whose value outside wins over the image's own: pyxis keeps
    the image's where both have one, and NGC images set several NCCL variables.
    """
    box = profile.container
    if box.runtime != "pyxis":
        return []
    here = os.getcwd()
    mounts = ",".join(_pair(mount) for mount in [here, *box.mounts])
    options = [
        f"--container-image={box.image}",
        f"--container-mounts={mounts}",
        f"--container-workdir={here}",
        "--no-container-mount-home",
        "--no-container-entrypoint",
    ]
    return [*options, f"--container-env={','.join(environment)}"] if environment else options


def inside(profile: Profile, command: list[str]) -> list[str]:
    """``command`` (its first word is the interpreter out here) as each task starts it: in the
    image, with the image's interpreter."""
    box = profile.container
    if box.runtime == "none":
        return command
    command = [box.python, *command[1:]]
    # the image has our packages itself
    if run_module.FILE in command and not _seen(profile, Path(run_module.FILE)):
        command[command.index(run_module.FILE)] = "-m"
    if box.runtime == "pyxis":
        return command
    here = os.getcwd()
    binds = [part for mount in [here, *box.mounts] for part in ("--bind", _pair(mount))]
    gpus = [] if profile.device == "cpu" else ["--nv"]
    return ["apptainer", "exec", *gpus, "--no-home", *binds, "--pwd", here, box.image, *command]


def for_step(profile: Profile) -> dict[str, str]:
    """environment.for_step, without what would send the image's interpreter to the node's
    library."""
    environ = environment.for_step(profile.passed)
    if profile.container.runtime != "none" and "PYTHONHOME" not in profile.passed:
        environ.pop("PYTHONHOME", None)
    return environ


def passed_on(profile: Profile, variables: dict[str, str]) -> dict[str, str]:
    """``variables`` and, for Apptainer, each of them once more as APPTAINERENV_NAME: it then wins
    over the image's own value."""
    if profile.container.runtime != "apptainer":
        return variables
    return {**variables, **{f"APPTAINERENV_{name}": value for name, value in variables.items()}}


def check_seen(profile: Profile, paths: dict[str, Path]) -> None:
    """ConfigError where one of ``paths`` (what it is -> where) is neither in the working directory
    nor below a mount: the ranks would not find it. A link counts for where it leads."""
    if profile.container.runtime == "none":
        return
    for what, path in paths.items():
        for place in (path.absolute(), path.resolve()):
            if not _seen(profile, place):
                raise ConfigError(
                    f"{what} = {str(path)!r}: {place} is not seen from inside the container of profile {profile.name}; "
                    f'add it, or a folder above it, to its [container] mounts, e.g. mounts = ["{place.parent}"]'
                )


def _seen(profile: Profile, place: Path) -> bool:
    roots = [Path.cwd(), *(Path(_pair(mount).split(":")[1]) for mount in profile.container.mounts)]
    return any(place.is_relative_to(root) for root in roots)


def _pair(mount: str) -> str:
    return mount if ":" in mount else f"{mount}:{mount}"
