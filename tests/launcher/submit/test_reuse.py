"""``submit --reuse``: a branch takes the finished stages of another run, where they are what it
would make itself."""

import json

import pytest

from tests.support.stub_project import small


@pytest.fixture
def branch(project):
    """A project whose run demo has a reward model, and a command that begins another run from
    it."""
    assert project.submit("--until", "reward", "--wait").returncode == 0

    def submit(name, *arguments):
        trainers = ("sft", "reward", "grpo" if "grpo" in arguments else "rlhf")
        return project.convoy(
            "submit",
            "full-pipeline",
            "--name",
            name,
            "--profile",
            "local",
            "--reuse",
            "demo",
            *small(*trainers),
            *arguments,
        )

    return submit


def executed(project) -> list[tuple[str, str, int]]:
    return [
        (row["run"], row["stage"], row["iteration"])
        for row in map(json.loads, (project.folder / "executed.jsonl").open())
    ]


def test_another_pipeline_begins_where_the_first_run_is(project, branch):
    """Nothing is trained twice, no byte is copied, and what is resumed, shown and refused is as if
    the run had made it itself."""
    done = branch("group", "--pipeline", "grpo", "--wait")
    assert done.returncode == 0 and "taken from runs/demo: convert, sft, reward\n" in done.stdout, (
        done.stdout + done.stderr
    )
    assert [row[1] for row in executed(project) if row[0] == "group"] == ["grpo"] * 3 + ["export", "mtbench"]
    demo, group = (project.folder / "runs" / name for name in ("demo", "group"))
    weights = "sft/checkpoints/iter_0000003/model/weights"
    assert (demo / weights).stat().st_ino == (group / weights).stat().st_ino
    own, taken = (json.loads((run / "sft" / "DONE.json").read_text()) for run in (demo, group))
    assert (
        taken["outputs"] == own["outputs"]
        and taken["run"] != own["run"]
        and taken["reused"]["identity"] == own["identity"]
    )
    assert (group / "sft" / "metrics.jsonl").read_text() == (demo / "sft" / "metrics.jsonl").read_text()
    assert {row["state"] for row in json.loads(project.convoy("status", "group", "--json").stdout)} == {"done"}
    before = len(executed(project))
    assert branch("group", "--pipeline", "grpo", "--wait").returncode == 0 and len(executed(project)) == before
    refused = branch("group", "--pipeline", "grpo", "--set", "sft.lr=1e-6")
    assert refused.returncode == 2 and "runs/group was submitted with another configuration" in refused.stderr


def test_only_what_is_configured_alike_is_taken(project, branch):
    done = branch("two", "--set", "reward.lr=1e-6", "--until", "reward", "--wait")
    assert done.returncode == 0 and "taken from runs/demo: convert, sft\n" in done.stdout
    assert [row[1] for row in executed(project) if row[0] == "two"] == ["reward"] * 3
    single = project.convoy(
        "submit",
        "rlhf",
        "--name",
        "three",
        "--profile",
        "local",
        "--reuse",
        "demo",
        "--wait",
        *small("sft", "reward", "rlhf"),
    )
    assert single.returncode == 0 and {row[1] for row in executed(project) if row[0] == "three"} == {"rlhf"}
    refused = branch("four", "--set", "convert.tensor_parallel=2")
    assert refused.returncode == 2 and "no stage of it is both done and configured as here" in refused.stderr


def test_other_rows_make_another_reward_model(project, branch):
    for run, text in (("demo", "a"), ("two", "b"), ("three", "b")):
        (project.folder / "runs" / run / "data").mkdir(parents=True, exist_ok=True)
        (project.folder / "runs" / run / "data" / "reward.jsonl").write_text(text)
    done = branch("two", "--until", "reward", "--wait")
    assert done.returncode == 0 and "taken from runs/demo: convert, sft\n" in done.stdout
    refused = project.convoy(
        "submit", "rlhf", "--name", "three", "--profile", "local", "--reuse", "demo", *small("sft", "reward", "rlhf")
    )
    assert refused.returncode == 2 and "rlhf starts from reward, not DONE in this run" in refused.stderr


def test_a_damaged_checkpoint_is_not_taken(project, branch):
    (project.run / "sft/checkpoints/iter_0000003/model/weights").write_text("sft 4")
    refused = branch("group", "--pipeline", "grpo")
    assert refused.returncode == 1 and "does not have the sha256 of its manifest" in refused.stderr
    assert not [row for row in executed(project) if row[0] == "group"]
