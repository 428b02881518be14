"""doctor on a real Slurm: what it finds there, a compute node through srun, a profile that then
runs a chain."""

import json

from launcher.config.profile import Profile
from launcher.doctor import slurm_findings
from tests.support.stub_project import wait_until


def doctor(project, *arguments) -> tuple[dict, dict]:
    """Findings by (section, name), and the profile's keys."""
    done = project.convoy("doctor", "--json", *arguments, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    said = json.loads(done.stdout)
    return {(row["section"], row["name"]): row for row in said["findings"]}, said["profile"]


def test_findings_are_what_the_cluster_says(project, queue):
    found, keys = doctor(project)
    config = slurm_findings.config_of(queue("scontrol", "show", "config"))
    assert found["Slurm", "version"]["value"] == config["SLURM_VERSION"] in queue("sinfo", "--version")
    assert found["Slurm", "accounting"]["value"] == "off" and found["Slurm", "JobRequeue"]["value"] == "1"
    assert found["Slurm", "preemption"]["value"] == "partition_prio, REQUEUE"
    assert found["Slurm", "MaxArraySize"]["value"] == config["MaxArraySize"]
    assert found["GPUs", "SelectType"]["value"].startswith("cons_tres")
    names = queue("sinfo", "-h", "-o", "%R").split()
    assert [name for section, name in found if section == "Partitions"] == names
    assert "Slurm sends TERM 10 s before" in found["Partitions", "grace"]["follows"]
    assert (keys["partition"], keys["gpus_per_node"], keys["max_nodes"], keys["max_minutes"]) == ("main", 8, 4, 1440)


def test_a_node_is_looked_at_and_the_written_profile_runs_a_stage(project, queue):
    """The job goes where --partition says; the profile that is written loads, and a stage runs with
    it."""
    done = project.convoy("doctor", "--node", "--partition", "urgent", "--write", "mine.toml", timeout=240)
    assert done.returncode == 0 and "Node 127.0.1." in done.stdout, done.stdout + done.stderr
    assert "the node reads what was just written here" in done.stdout and "0.16.1" in done.stdout
    assert not list(project.folder.glob("**/.convoy-doctor*")), "the canary is gone"
    text = (project.folder / "mine.toml").read_text()
    assert 'partition = "urgent"' in text and 'device = "cpu"  # Node 127.0.1.' in text
    ran = project.submit("--until", "convert", "--wait", profile="mine.toml")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    job = project.ledger("submitted")[0]["job"]
    assert queue("squeue", "-h", "-t", "all", "-j", str(job), "-o", "%P").strip() == "urgent"
    assert Profile(**project.json("config.json")["profile"]).slurm == queue("sinfo", "--version").split()[-1]


def test_a_node_that_does_not_come_is_said_and_its_request_taken_back(project, queue):
    all_nodes = ("--exclusive", "--nodes=4", "--partition=urgent", "--output=/dev/null", "--wrap=sleep 60")
    blocker = queue("sbatch", "--parsable", *all_nodes).strip()
    try:
        wait_until(
            lambda: queue("squeue", "-h", "-j", blocker, "-o", "%T").strip() == "RUNNING", 20, "the job on all nodes"
        )
        found, _ = doctor(project, "--node", "--timeout", "1")
        assert (
            "none within 1 s" in found["Node", "a node"]["value"] and "--timeout" in found["Node", "a node"]["follows"]
        )
        assert not queue("squeue", "-h", "-n", "convoy-doctor", "-o", "%A").split()
    finally:
        queue("scancel", blocker)


def test_a_partition_that_is_not_there_is_named_with_those_that_are(project):
    refused = project.convoy("doctor", "--partition", "gpu")
    assert refused.returncode == 2 and "no such partition; there are: main, low" in refused.stderr
