"""A command checks everything before it changes anything: whatever is refused leaves every byte
of the run as it was."""

import json
import os
import shutil
import time

import pytest

from launcher.run.folder import Run, this_process
from tests.support.stub_project import SMALL, wait_until

SITE = 'scheduler = "slurm"\nmax_nodes = 4\n'


def content(project) -> dict[str, bytes]:
    """Every file of all runs but locks, which are empty, and the log of a preparation that
    failed."""
    return {
        str(path): path.read_bytes()
        for path in (project.folder / "runs").rglob("*")
        if path.is_file() and path.name not in (".lock", ".prepare.lock", "prepare.log")
    }


def test_a_refused_resume_changes_nothing(project):
    assert project.submit("--wait").returncode == 0
    (project.folder / "site.toml").write_text(SITE)
    project.environment["SLURM_CONF"] = "/nowhere"
    (project.folder / "bad_data").touch()
    ghost = {**this_process(), "host": "gone-17", "pid": 4242}
    Run(project.run).record("runner", stages=[], **ghost)
    for path in project.run.rglob("*"):
        os.utime(path, (time.time() - 300,) * 2)
    before = content(project)
    for words, *arguments in (
        ("present: 1, 2, 3", "--from", "rlhf", "--load-iteration", "200", "--set", "rlhf.kl_coef=0.02", "--take-over"),
        (
            "with the changed values sft starts over",
            "--from",
            "rlhf",
            "--load-iteration",
            "2",
            "--set",
            "sft.lr=.5",
            "--take-over",
        ),
        (
            "rlhf ends at iterations = 2",
            "--from",
            "rlhf",
            "--load-iteration",
            "3",
            "--set",
            "rlhf.iterations=2",
            "--take-over",
        ),
        ("line 7: field prompt", "--set", "data.seed=5", "--from", "rlhf", "--take-over"),
        ("--from rlhf comes after --until sft", "--from", "rlhf", "--until", "sft", "--take-over"),
        ("nothing was changed", "--from", "rlhf", "--profile", "site.toml", "--set", "rlhf.lr=.5", "--take-over"),
        ("no stage", "--from", "dpo", "--take-over"),
    ):
        refused = project.convoy("resume", "demo", *arguments, "--yes")
        assert refused.returncode and words in refused.stderr, (arguments, refused.stdout, refused.stderr)
        assert content(project) == before, arguments


def test_a_refused_submit_changes_nothing(project):
    """A new run that is refused is none; of another one neither configuration nor results
    change."""
    (project.folder / "bad_data").touch()
    sweep = ["submit", "full-pipeline", "--name", "lr", "--profile", "local", "--sweep", "data.seed=1,2", *SMALL]
    for refused in (project.submit(), project.convoy(*sweep)):
        assert refused.returncode == 2 and "line 7: field prompt is missing" in refused.stderr, refused.stderr
    none = project.convoy("status")
    assert none.returncode == 2 and "no run in runs" in none.stderr, none.stdout + none.stderr
    (project.folder / "bad_data").unlink()
    assert project.submit("--until", "reward", "--wait").returncode == 0
    (project.run / "sft/checkpoints/iter_0000003/model/weights").write_text("sft 4")
    before = content(project)
    damaged = project.convoy(
        "submit", "full-pipeline", "--name", "other", "--profile", "local", "--reuse", "demo", *SMALL
    )
    assert damaged.returncode == 1 and "does not have the sha256" in damaged.stderr
    (project.run / "sft/checkpoints/iter_0000003/model/weights").write_text("sft 3")
    shutil.rmtree(project.folder / "runs/other")
    for path in ("demo", "three"):
        (project.folder / "runs" / path / "data").mkdir(parents=True, exist_ok=True)
        (project.folder / "runs" / path / "data/reward.jsonl").write_text(path)
    lacking = project.convoy("submit", "rlhf", "--name", "three", "--profile", "local", "--reuse", "demo", *SMALL)
    assert lacking.returncode == 2 and "rlhf starts from reward" in lacking.stderr
    assert not (project.folder / "runs/three/config.json").exists() and not (project.folder / "runs/three/sft").exists()
    after = {
        name: text
        for name, text in content(project).items()
        if "/three/" not in name and not name.endswith("reward.jsonl")
    }
    assert {**before, **after}.keys() == before.keys()


def test_resume_goes_as_far_as_the_run_was_submitted_for(project):
    project.behave(sft={"fail_at": 2})
    assert project.submit("--until", "sft", "--wait").returncode == 1
    (project.folder / "mended").touch()
    resumed = project.convoy("resume", "demo", "--wait")
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert "reward, rlhf, export, mtbench not started; --until STAGE or --all changes it" in resumed.stdout
    assert {event["stage"] for event in project.ledger("started")} == {"convert", "sft"}
    refused = project.convoy("resume", "demo", "--from", "reward")
    assert refused.returncode == 2 and "until sft only; add --until reward, or --all" in refused.stderr
    further = project.convoy("resume", "demo", "--until", "reward", "--wait")
    assert further.returncode == 0 and "stages of this run from now on: convert, sft, reward" in further.stdout, (
        further.stderr
    )
    assert project.convoy("resume", "demo", "--all", "--wait").returncode == 0
    assert [event["stage"] for event in project.ledger("started")][-3:] == ["rlhf", "export", "mtbench"]
    said = project.convoy("resume", "demo", "--from", "mtbench", "--set", "mtbench.seed=1", "--yes", "--wait")
    assert "=> mtbench starts over (--from; without it, it keeps what it has); what it had is kept aside" in said.stdout
    assert (
        "goes on from" not in said.stdout
        and "mtbench starts over; what it had is in runs/demo/mtbench.1" in said.stdout
    )
    longer = project.convoy("resume", "demo", "--set", "sft.iterations=5", "--yes", "--until", "sft", "--wait")
    assert (
        "=> sft goes on from iteration 3, with the new values; what was made from it starts over: reward, rlhf"
        in longer.stdout
    )
    assert (project.run / "rlhf.1/DONE.json").exists(), longer.stdout + longer.stderr


@pytest.mark.parametrize(
    "asked, selected", [(None, 6), (["sft"], 2), (["mtbench"], 6), (["reward", "gone"], 3), (["gone"], 6), ([], 6)]
)
def test_a_run_names_its_stages_and_what_they_need(tmp_path, asked, selected):
    about = {"id": "x-1", "profile": "local", "selected": asked}
    (tmp_path / "config.json").write_text(json.dumps({"run": about, "profile": {"scheduler": "local"}}))
    assert len(Run(tmp_path).selected()) == selected


@pytest.mark.parametrize("wait", [[], ["--wait"]])
def test_two_submits_at_once_say_what_happened(project, wait):
    project.behave(convert={"step_s": 2})
    command = ["submit", "full-pipeline", "--name", "demo", "--profile", "local", "--until", "convert", *SMALL, *wait]
    both = [project.start(*command) for _ in range(2)]
    said = [process.communicate(timeout=90)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    wait_until(lambda: (project.run / "convert/DONE.json").exists(), 60, "convert")
    (runner,) = project.ledger("runner")
    if not wait:
        assert sum(f"started in the background: process {runner['pid']}" in text for text in said) == 1, said
    assert sum(f"is being worked on by a local runner (process {runner['pid']}" in text for text in said) == 1, said
    assert len(project.ledger("started")) == 1
