"""What is rendered for a site, read by the real sbatch: accepted as it is, and allocated as it was
meant."""

import pytest

from launcher.config.sections import Profile, Resources
from launcher.slurm.script import JobRequest, script
from tests.support.slurm_jobs import jobs


def queued(queue, tmp_path, gpus=2, spares=0, **profile) -> dict[str, str]:
    """``scontrol show job`` of a held job of 2 nodes with this profile."""
    request = JobRequest(
        name="x",
        comment="x",
        command="true",
        output=str(tmp_path / "out"),
        resources=Resources(nodes=2, spares=spares, gpus_per_node=gpus),
        profile=Profile(name="test", scheduler="slurm", slurm="22.05.8", **profile),
    )
    (tmp_path / "x.sbatch").write_text(script(request))
    number = queue("sbatch", "--parsable", "--hold", str(tmp_path / "x.sbatch")).strip()
    try:
        return dict(part.split("=", 1) for part in queue("scontrol", "show", "job", number).split() if "=" in part)
    finally:
        queue("scancel", number)


def test_a_part_of_a_node_with_spares_and_more_options(queue, tmp_path):
    job = queued(queue, tmp_path, spares=1, mem_gb=400, partition="low", options={"nice": 50, "mail-type": "FAIL"})
    assert (job["NumNodes"], job["MinMemoryNode"], job["Partition"]) == ("3-3", "100G", "low")
    assert (
        job["TresPerNode"] == "gres:gpu:2"
        and job["OverSubscribe"] == "OK"
        and job["Requeue"] == "1"
        and job["Nice"] == "50"
    )


def test_whole_nodes_get_all_memory(queue, tmp_path):
    job = queued(queue, tmp_path, gpus=8, exclusive=True)
    assert (job["OverSubscribe"], job["MinMemoryNode"], job["NumNodes"]) == ("NO", "0", "2-2")


@pytest.mark.parametrize("option", ["gpus-per-node", "gres"])
def test_both_ways_to_ask_for_gpus_mean_the_same(queue, tmp_path, option):
    assert queued(queue, tmp_path, gpu_option=option)["TresPerNode"] == "gres:gpu:2"


def test_an_option_that_slurm_does_not_know_is_refused_by_it_by_name(queue, tmp_path):
    with pytest.raises(AssertionError, match="no-such-option"):
        queued(queue, tmp_path, options={"no-such-option": True})


def test_stages_of_a_chain_run_in_partitions_of_their_own(queue, project):
    own = ("sft.partition=low", "sft.options.nice=50", "sft.options.hold=true")
    sets = [word for setting in own for word in ("--set", f"resources.{setting}")]
    refused = project.submit(*sets, "--until", "sft", profile="dev")
    assert refused.returncode == 2 and "resources.sft.options.hold: the launcher sets it" in refused.stderr
    assert not project.run.exists()
    unknown = project.submit("--set", "resources.sft.partition=no-such", "--until", "sft", profile="dev")
    assert unknown.returncode == 2 and "no-such" in unknown.stderr and not project.run.exists(), unknown.stderr
    done = project.submit(*sets[:4], "--until", "sft", "--wait", profile="dev")
    assert done.returncode == 0, done.stdout + done.stderr
    found = {
        stage: dict(part.split("=", 1) for part in queue("scontrol", "show", "job", job[0]).split() if "=" in part)
        for stage, job in jobs(queue, project).items()
    }
    assert {stage: (job["Partition"], job["Nice"]) for stage, job in found.items()} == {
        "convert": ("main", "0"),
        "sft": ("low", "50"),
    }
