"""A real chain with a key that the ranks print: it reaches them, and nothing else that the run or
Slurm writes, nor any command line."""

import contextlib
import stat
import time
from pathlib import Path

from tests.support.stub_project import ROOT, SMALL

NAME, KEY = "WANDB_API_KEY", "k3y-0f-the-run-4711"


def holding(folder: Path) -> list[str]:
    """Files below ``folder`` whose name or content has the key."""
    found = []
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):  # written aside and renamed meanwhile
            if KEY in path.name or (stat.S_ISREG(path.lstat().st_mode) and KEY.encode() in path.read_bytes()):
                found.append(str(path))
    return found


def command_lines() -> list[str]:
    """What ``ps`` shows of every process of the machine."""
    lines = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            lines.append(path.read_bytes().replace(b"\0", b" ").decode(errors="replace"))
    return lines


def test_a_key_reaches_the_ranks_and_nothing_else(project, slurm, tmp_path_factory):
    keys = tmp_path_factory.mktemp("home") / "keys.env"
    keys.write_text(f"# W&B\nexport {NAME}='{KEY}'\n")
    keys.chmod(0o600)
    site = project.folder / "mine.toml"
    site.write_text((ROOT / "slurm/clusters/dev.toml").read_text() + f'secrets = "{keys}"\n')
    # in the submitter's shell as well, which sbatch would store with the job
    project.environment[NAME] = KEY
    project.behave(sft={"say": NAME, "step_s": 0.3}, reward={"say": NAME, "exit": 3})
    arguments = ["full-pipeline", "--until", "reward", "--name", "demo", "--profile", str(site), *SMALL]

    said = ""
    for command in (["plan", *arguments], ["render", *arguments], ["submit", *arguments, "--dry-run"]):
        done = project.convoy(*command)
        assert done.returncode == 0, done.stderr
        said += done.stdout + done.stderr

    submitted = project.convoy("submit", *arguments)
    assert submitted.returncode == 0, submitted.stderr
    ranks, shown, stored, deadline = 0, set(), set(), time.monotonic() + 60
    while (
        project.run.joinpath("reward/status.json").exists() is False
        or project.json("reward/status.json")["state"] != "failed"
    ):
        assert time.monotonic() < deadline, project.states()
        lines = command_lines()
        ranks = max(ranks, sum("run_module.py training.sft" in line for line in lines))
        shown |= {line for line in lines if KEY in line}
        stored |= set(holding(Path(slurm["SLURM_CONF"]).parent))
        time.sleep(0.05)
    for command in (
        ["status", "demo"],
        ["status", "demo", "--json"],
        ["logs", "demo", "sft"],
        ["logs", "demo", "reward"],
    ):
        done = project.convoy(*command)
        said += done.stdout + done.stderr

    for stage in ("sft", "reward"):
        assert f"{NAME} is ********" in project.log(stage), "its ranks had it, and printed it"
    assert ranks >= 2, "the command lines were looked at while the ranks ran"
    assert not shown, shown
    assert not holding(project.folder), "scripts, logs, manifests, ledger, configuration"
    assert not stored, "Slurm's own state and spool"
    assert KEY not in said + submitted.stdout + submitted.stderr


def test_a_key_file_that_others_can_read_stops_the_submission(project):
    keys = project.folder / "keys.env"
    keys.write_text(f"{NAME}={KEY}\n")
    keys.chmod(0o640)
    site = project.folder / "mine.toml"
    site.write_text((ROOT / "slurm/clusters/dev.toml").read_text() + f'secrets = "{keys}"\n')
    refused = project.submit(profile=str(site))
    assert refused.returncode == 2 and f"chmod 600 {keys}" in refused.stderr and KEY not in refused.stderr
    assert not (project.run / "ledger.jsonl").exists()
