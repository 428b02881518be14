"""Options of sbatch that a site or one stage may set. Standard library only.

A new one is a field of ``SbatchOptions``: the checks, the batch script and the comment of
``doctor --write`` follow from it.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass, field
from typing import ClassVar

PROFILE_KEYS = {
    "exclusive": "exclusive",
    "gpus-per-node": "gpu_option and gpu_type",
    "gres": "gpu_option and gpu_type",
    "mem": "mem_gb",
    "signal": "signal_lead_s",
}
"""Options that follow from other keys of a profile."""
STAGE_KEYS = {"cpus-per-task": "cpus_per_gpu", "nodes": "nodes", "time": "minutes"}
"""Options that follow from keys of ``resources.STAGE``."""
FIXED = {
    "comment",
    "dependency",
    "error",
    "hold",
    "job-name",
    "kill-on-invalid-dep",
    "ntasks",
    "ntasks-per-node",
    "open-mode",
    "output",
    "requeue",
}
"""Options that have no key: the launcher needs them as it sets them."""
REFUSED = {
    "array",
    "chdir",
    "export",
    "export-file",
    "gid",
    "input",
    "no-requeue",
    "parsable",
    "quiet",
    "test-only",
    "uid",
    "usage",
    "wait",
    "wrap",
}
"""Options that would change what is run, as whom, or what sbatch prints."""


@dataclass(frozen=True, kw_only=True)
class SbatchOptions:
    """Where Slurm puts a job. Each field except ``options`` is sbatch's long option of the same
    name."""

    partition: str = ""
    """Slurm's partition. This and the next four are sbatch's options of the same name."""
    account: str = ""
    """Account that the jobs are charged to."""
    qos: str = ""
    """Quality of service."""
    reservation: str = ""
    """Reservation whose nodes the jobs may use."""
    constraint: str = ""
    """Features that the nodes must have, e.g. "a100&nvlink"."""
    options: dict = field(default_factory=dict)
    """More options of sbatch, without dashes: { mail-type = "FAIL", contiguous = true, nice = 100
    }."""

    of_profile: ClassVar[str] = " of the profile"
    """What follows the name of a profile's key in errors."""

    def sbatch_options(self) -> dict[str, str | int | bool]:
        """Option -> value, for the options that are set."""
        named = {name.replace("_", "-"): value for name in SITE_OPTIONS if (value := getattr(self, name))}
        return {**named, **self.options}

    def check_sbatch_options(self) -> None:
        """ValueError for a value that does not fit on a line of a script, and for an option that
        the launcher sets or refuses."""
        for name in SITE_OPTIONS:
            one_line(name, getattr(self, name))
        for name, value in self.options.items():
            self._check_option(name, value)

    def _check_option(self, name: str, value) -> None:
        if not re.fullmatch(r"[a-z][a-z0-9-]+", name):
            raise ValueError(f"options.{name}: expected a long option of sbatch without its dashes, e.g. mail-type")
        key = ""
        if name in PROFILE_KEYS:
            key = PROFILE_KEYS[name] + self.of_profile
        elif name in STAGE_KEYS:
            key = f"resources.<stage>.{STAGE_KEYS[name]}"
        elif (own := name.replace("-", "_")) in SITE_OPTIONS:
            key = own
        if key or name in FIXED:
            use = f"; use {key}" if key else ""
            raise ValueError(f"options.{name}: the launcher sets it{use}; remove it from options")
        if name in REFUSED:
            raise ValueError(f"options.{name}: it would change what the job runs or what sbatch prints; remove it")
        if isinstance(value, bool) and not value:
            raise ValueError(f"options.{name} = false: leave the line out")
        if not isinstance(value, (str, int, bool)) or value == "":
            raise ValueError(
                f"options.{name} = {value!r}: expected a string, a number, or true for an option without a value"
            )
        one_line(f"options.{name}", str(value))


SITE_OPTIONS = tuple(one.name for one in dataclasses.fields(SbatchOptions) if one.name != "options")
"""Keys of a profile and of ``resources.STAGE`` that are sbatch's long options of the same name."""


def one_line(name: str, value) -> None:
    """ValueError unless ``value`` is a string that can stand in one line of a script: a line break
    would begin a line of its own."""
    if not isinstance(value, str) or not value.isprintable():
        raise ValueError(
            f"{name}: {value!r} is no text, or has a line break or another character that can't be printed; remove it"
        )
