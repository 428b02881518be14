"""``doctor``: ask the site what it has, say what follows from each finding, and write a profile
from them."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import secrets
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from launcher.config import environment
from launcher.config.profile import Profile
from launcher.config.sbatch import SITE_OPTIONS
from launcher.doctor import node_findings, slurm_findings
from launcher.doctor.machine_findings import here
from launcher.doctor.slurm_findings import Finding
from launcher.run.folder import lock, write_text
from launcher.slurm import commands, container, script, sites
from training.errors import ConfigError

NODE_SCRIPT = Path(__file__).parents[1] / "slurm" / "node_probe.py"
NODE_MARK = "CONVOY-NODE "
JOB_MINUTES = 10
"""Time limit of the job on the node."""
STYLES = {"ok": "green", "note": "yellow", "bad": "bold red"}


@dataclass(frozen=True)
class Report:
    findings: list[Finding]

    @property
    def settings(self) -> dict:
        """Keys of a profile that follow from all findings; a later one wins, tables are merged."""
        merged: dict = {}
        for finding in self.findings:
            for key, value in finding.settings.items():
                merged[key] = {**merged[key], **value} if isinstance(value, dict) and key in merged else value
        return merged

    @property
    def bad(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.level == "bad"]


def examine(partition: str | None, profile: Profile | None, on_node: bool, timeout_s: int) -> Report:
    """Ask Slurm, look at this machine, and with ``on_node`` at a compute node; ConfigError for a
    partition that isn't there.

    ``profile``: a site's profile whose partition, account, modules and container the node's job
    uses.
    """
    reason = commands.unusable()
    findings = (
        [Finding("Slurm", "Slurm", "none", _without(reason), "note")]
        if reason
        else ask_slurm(partition or (profile.partition if profile else None))
    )
    findings += here(Path.cwd(), "" if reason else commands.call("srun", "--help"))
    if on_node:
        options = {
            "name": "doctor",
            "scheduler": "local" if reason else "slurm",
            **({} if reason else Report(findings).settings),
        }
        findings += look_at_node(profile or Profile(**options), timeout_s)
    return Report(findings)


def _without(reason: str) -> str:
    """What follows from there being no Slurm to ask."""
    if commands.login_node(reason):
        return f"{reason}; ask again when it does; stages run here, one after the other, only with --profile local"
    return f"{reason}: stages run here, one after the other (profile local)"


def ask_slurm(partition: str | None) -> list[Finding]:
    config = slurm_findings.config_of(commands.call("scontrol", "show", "config"))
    partitions = slurm_findings.partitions_of(
        commands.call("scontrol", "show", "partition", "-o"),
        commands.call("sinfo", "-h", "-N", "-o", "%N|%P|%G|%m|%c|%T|%f"),
    )
    chosen = slurm_findings.choose_partition(partitions, partition)
    if partition and chosen is None:
        raise ConfigError(
            f"--partition {partition}: no such partition; there are: {', '.join(one.name for one in partitions)}"
        )
    findings = slurm_findings.slurm_findings(config, accounts(config))
    findings += slurm_findings.partition_findings(
        partitions, chosen, "MEMORY" in config.get("SelectTypeParameters", "").upper()
    )
    if chosen and not chosen.gpus:
        findings.append(Finding("GPUs", chosen.name, "none", "its nodes have no GPUs: ranks run on the CPU", "note"))
    if names := re.findall(
        r"^ReservationName=(\S+)", commands.call("scontrol", "show", "reservation", "-o"), re.MULTILINE
    ):
        findings.append(
            Finding("Partitions", "reservations", ", ".join(names), 'to use one: reservation = "..." in the profile')
        )
    order = ("Slurm", "GPUs", "Partitions")
    return sorted(findings, key=lambda one: order.index(one.section))


def accounts(config: slurm_findings.Known) -> list[str]:
    """Accounts of this user where Slurm keeps them; none where its database does not answer."""
    if config.get("AccountingStorageType", "/none").endswith("/none"):
        return []
    with contextlib.suppress(commands.SlurmError):
        # a database may serve several clusters: an account of another one is none here
        here = [f"cluster={config['ClusterName']}"] if "ClusterName" in config else []
        where = [f"user={commands.user()}", *here]
        rows = commands.call("sacctmgr", "-nP", "show", "assoc", "where", *where, "format=account").splitlines()
        return sorted({row.strip() for row in rows if row.strip()})
    return []


def look_at_node(profile: Profile, timeout_s: int) -> list[Finding]:
    """Run launcher/slurm/node_probe.py on one node, through srun where there is Slurm, and judge
    what it says."""
    folder = Path("runs") if Path("runs").is_dir() else Path()
    canary, token = (folder / f".convoy-doctor-{secrets.token_hex(4)}").absolute(), secrets.token_hex(8)
    python = [sys.executable, "-", str(canary), token]
    command = (
        [*node_srun(profile, timeout_s), *container.inside(profile, python)] if profile.scheduler == "slurm" else python
    )
    write_text(canary, token)
    try:
        with contextlib.ExitStack() as stack:
            with contextlib.suppress(ConfigError):  # no locks here: ``here`` says so
                stack.enter_context(lock(canary))
            code, out, err = run_on_node(command, timeout_s, environment.for_sbatch(profile.passed))
    finally:
        canary.unlink()
    answer = next((line[len(NODE_MARK) :] for line in out.splitlines() if line.startswith(NODE_MARK)), None)
    if answer:
        return node_findings.of_node(json.loads(answer))
    if code is None or re.search(r"nodes are busy|[Ii]mmediate|timed out|QOS.*[Ll]imit", err):
        return [
            Finding(
                "Node",
                "a node",
                f"none within {timeout_s} s",
                "all are busy: try again with --timeout SECONDS, or another "
                "--partition; the rest of the findings holds",
                "note",
            )
        ]
    last = (err.strip() or out.strip() or "no message").splitlines()[-1]
    return [
        Finding(
            "Node",
            "a node",
            f"exit code {code}: {last}",
            "a stage would fail there in the same way: this interpreter "
            f"({command[-4]}) or the job's options do not work on that node",
            "bad",
        )
    ]


def node_srun(profile: Profile, timeout_s: int) -> list[str]:
    """srun for one task and one GPU of one node, given up after ``timeout_s`` in the queue."""
    part_of_node = dataclasses.replace(profile, exclusive=False, mem_gb=0)
    options = script.node_options(part_of_node, min(1, profile.gpus_per_node)) | profile.sbatch_options()
    flags = [f"--{key}" if value is True else f"--{key}={value}" for key, value in options.items()]
    srun = [
        "srun",
        "--export=ALL",
        f"--immediate={timeout_s}",
        f"--time={JOB_MINUTES}",
        "--nodes=1",
        "--ntasks=1",
        "--job-name=convoy-doctor",
        *flags,
        *container.srun_options(profile),
    ]
    setup = script.site_setup(profile)
    return (
        srun
        if not setup or profile.container.runtime == "pyxis"
        else [*srun, "bash", "-c", "\n".join([*setup, 'exec "$@"']), "bash"]
    )


def run_on_node(command: list[str], timeout_s: int, environ: dict[str, str]) -> tuple[int | None, str, str]:
    """(exit code, stdout, stderr); None when it took more than ``timeout_s`` to start and
    JOB_MINUTES to run."""
    process = subprocess.Popen(
        command,
        env=environ,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    )
    try:
        out, err = process.communicate(NODE_SCRIPT.read_text(encoding="utf-8"), timeout=timeout_s + JOB_MINUTES * 60)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)  # srun then gives its place in the queue back
        try:
            out, err = process.communicate(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            out, err = process.communicate()
        return None, out, err
    return process.returncode, out, err


def shown(report: Report, console: Console) -> None:
    """One table a section."""
    for section in dict.fromkeys(finding.section for finding in report.findings):
        table = Table(
            title=section, title_justify="left", title_style="bold", box=None, padding=(0, 1), show_header=False
        )
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold", ratio=2)
        table.add_column(overflow="fold", ratio=3)
        for finding in report.findings:
            if finding.section == section:
                mark = {"bad": "!", "note": "?"}.get(finding.level, " ")
                table.add_row(
                    Text.assemble((mark, STYLES[finding.level]), f" {finding.name}"), finding.value, finding.follows
                )
        console.print(table)
    notes = sum(finding.level == "note" for finding in report.findings)
    console.print(f"\n{len(report.bad)} that will fail (!), {notes} to know (?)", highlight=False)


def as_json(report: Report) -> dict:
    return {"findings": [dataclasses.asdict(finding) for finding in report.findings], "profile": report.settings}


def check_writable(path: Path) -> None:
    """ConfigError for a file that ``write_profile`` would not write, before a node is waited
    for."""
    if path.suffix != ".toml":
        raise ConfigError(f"--write {path}: a profile's name ends in .toml; try {path.with_suffix('.toml')}")
    if path.exists():
        raise ConfigError(f"--write {path}: exists already; name another file, or remove it")
    above = next(folder for folder in path.absolute().parents if folder.exists())
    if not os.access(above, os.W_OK):
        raise ConfigError(f"--write {path}: {above} can't be written to; name a file elsewhere")


def write_profile(report: Report, path: Path) -> None:
    """A profile from the findings; ConfigError where there is no Slurm to write one for."""
    check_writable(path)
    if "partition" not in report.settings:
        raise ConfigError(
            f"--write {path}: no Slurm with an open partition was found, so there is nothing to write; "
            "the profile local is for this machine"
        )
    write_text(path, profile_text(report))
    sites.load(str(path))


def profile_text(report: Report) -> str:
    """TOML: each key with the finding that it follows from, then the keys that only a person knows,
    as comments."""
    why = {key: f"{one.section}: {one.name} = {one.value}" for one in report.findings for key in one.settings}
    settings, lines = (
        report.settings,
        [
            "# Written by `python -m launcher doctor --write`; every key is explained in "
            "launcher/config/profile.py. Slurm's version is asked again at each submit.",
            'scheduler = "slurm"',
        ],
    )
    for field in dataclasses.fields(Profile):
        if (
            field.name in settings
            and field.name != "environment"
            and (settings[field.name] or field.name not in ("mem_gb", "gpu_type"))
        ):
            lines.append(f"{field.name} = {_toml(settings[field.name])}  # {_comment(why[field.name])}")
    if "network" not in settings:
        lines.append('network = "auto"  # a file of slurm/networks; doctor --node looks at the fabric')
    environment = settings.get("environment", {})
    lines.append(
        f"environment = {{{', '.join(f' {key} = {_toml(value)}' for key, value in environment.items())} }}"
        if environment
        else 'environment = {}  # variables of the ranks, e.g. { NCCL_SOCKET_IFNAME = "=ib0" }; no keys'
    )
    lines += [
        "# " + "  ".join(f'{key} = ""' for key in SITE_OPTIONS if key != "partition"),
        'modules = []  # e.g. ["cuda/12.4"]',
        'setup = []  # shell lines, e.g. ["source .venv/bin/activate"]',
        '# secrets = "~/.config/convoy.env"  # KEY=VALUE lines, chmod 600: given to the ranks and to nothing else',
        "# [container]",
        '# runtime = "pyxis"  # or "apptainer"',
        '# image = "/shared/images/convoy.sqsh"  # made by slurm/container',
        '# mounts = ["/shared/models", "/shared/data:/data:ro"]',
    ]
    return "\n".join(lines) + "\n"


def _toml(value) -> str:
    # TOML's strings, numbers and booleans are written as JSON's
    return json.dumps(value, ensure_ascii=False)


def _comment(text: str) -> str:
    return "".join(letter if letter.isprintable() else "?" for letter in text)[:100]
