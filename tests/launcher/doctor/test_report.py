"""doctor's judgement from recorded text: sites that are not here, and what would go wrong on each.
Apex is told apart unimported."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from launcher.config.profile import Profile
from launcher.doctor import machine_findings, node_findings, slurm_findings
from launcher.doctor import report as doctor
from launcher.doctor.slurm_findings import Finding
from launcher.slurm import network, node_probe, sites
from tests.support.stub_project import ROOT
from training.errors import ConfigError

CONFIG = """\
Configuration data as of 2026-11-23T23:44:40
AccountingStorageEnforce = associations,limits,qos
AccountingStorageType   = accounting_storage/slurmdbd
AuthInfo                = (null)
ClusterName             = big
EnforcePartLimits       = NO
GresTypes               = gpu,nic
JobRequeue              = 0
KillWait                = 30 sec
MaxArraySize            = 1
MinJobAge               = 300 sec
PreemptMode             = CANCEL
PreemptType             = preempt/qos
SelectType              = select/cons_tres
SelectTypeParameters    = CR_CORE_MEMORY
SLURM_VERSION           = 20.11.9
"""
PARTITIONS = """\
PartitionName=cpu AllowAccounts=ALL Default=YES GraceTime=0 MaxNodes=UNLIMITED MaxTime=UNLIMITED OverSubscribe=NO PreemptMode=OFF State=UP
PartitionName=a100 AllowAccounts=nlp,vision Default=NO GraceTime=120 MaxNodes=16 MaxTime=2-00:00:00 OverSubscribe=EXCLUSIVE \
PreemptMode=REQUEUE State=UP
PartitionName=old AllowAccounts=ALL Default=NO GraceTime=0 MaxNodes=4 MaxTime=08:00:00 OverSubscribe=NO PreemptMode=OFF State=DOWN
"""
NODES = """\
c1|cpu*|(null)|256000|64|idle|(null)
g1|a100|gpu:a100:8(S:0-1),nic:1|1031000|128|idle|ib
g2|a100|gpu:a100:8(S:0-1),nic:1|1029000|128|mixed|ib
g3|a100|gpu:a100:4(S:0-1),nic:1|1031000|128|drained|ib
o1|old|gpu:8|512000|64|idle|(null)
"""
SEEN = {
    "host": "g1",
    "python": "/usr/bin/python3",
    "python_version": "3.12.3",
    "driver": "580.1",
    "torch": {
        "version": "2.11.0+cu130",
        "cuda": "13.0",
        "available": True,
        "nccl": "2.28.9",
        "gpus": [["A100-SXM4-80GB", 85100000000, [8, 0]]],
    },
    "gpus": [{"name": "NVIDIA A100-SXM4-80GB", "memory_gb": 80, "mig": False, "used_mb": 3, "ours": True}],
    "apex": {"kind": "absent", "where": "", "version": "", "extensions": []},
    "adapters": [
        {"name": f"mlx5_{n}", "layer": "InfiniBand", "gbps": 200 if n < 4 else 100, "active": True} for n in range(5)
    ],
    "packages": {"torch": "2.11.0+cu130", "megatron-core": "0.16.1", "transformer-engine": "2.11.0"},
    "address": "10.0.0.7",
    "interfaces": ["eth0"],
    "ports": [32768, 60999],
    "locked_memory": -1,
    "shm_gb": 500,
    "programs": {},
    "canary": "seen",
}


def judged(changes: dict) -> dict[str, Finding]:
    return {finding.name: finding for finding in node_findings.of_node({**SEEN, **changes})}


def site(**changes) -> list[Finding]:
    config = {**slurm_findings.config_of(CONFIG), **changes}
    found = slurm_findings.partitions_of(PARTITIONS, NODES)
    return slurm_findings.slurm_findings(config, ["nlp"]) + slurm_findings.partition_findings(
        found, slurm_findings.choose_partition(found, None), True
    )


def test_a_strange_site_s_findings_and_their_levels():
    levels = {finding.name: finding.level for finding in site()}
    assert levels == {
        "version": "note",
        "cluster": "ok",
        "accounting": "ok",
        "account": "ok",
        "GresTypes": "ok",
        "SelectType": "ok",
        "preemption": "note",
        "JobRequeue": "note",
        "requeue delay": "ok",
        "MaxArraySize": "note",
        "KillWait": "ok",
        "EnforcePartLimits": "note",
        "cpu": "ok",
        "a100": "ok",
        "old": "note",
    }
    said = {finding.name: finding.follows for finding in site()}
    assert (
        "still inherits the cores" in said["version"]
        and "--requeue" in said["JobRequeue"]
        and "no sweeps" in said["MaxArraySize"]
    )
    assert "resume RUN" in said["preemption"] and "PartitionTimeLimit" in said["EnforcePartLimits"]
    assert (
        "Slurm sends TERM 120 s before" in said["a100"]
        and "only for accounts nlp,vision" in said["a100"]
        and said["old"] == "takes no jobs"
    )


@pytest.mark.parametrize(
    "changes, name, level, words",
    [
        ({"AccountingStorageType": "accounting_storage/none"}, "accounting", "note", "forgets a job 300 s"),
        ({"PreemptMode": "SUSPEND,GANG"}, "preemption", "bad", "NCCL then times out"),
        ({"PreemptType": "preempt/none"}, "preemption", "ok", "no job is taken"),
        ({"SLURM_VERSION": "18.08.1"}, "version", "note", "--gres=gpu:N"),
        ({"SLURM_VERSION": "25.11.2-1"}, "version", "ok", "SRUN_CPUS_PER_TASK"),
        ({"SelectType": "select/cons_res"}, "GresTypes", "note", "by --gres=gpu:N"),
        ({"GresTypes": "(null)"}, "GresTypes", "note", "whole nodes"),
        ({"SelectType": "select/linear"}, "whole nodes", "note", "one GPU costs as much"),
    ],
)
def test_what_follows_from_the_controller_s_settings(changes, name, level, words):
    found = next(finding for finding in site(**changes) if finding.name == name)
    assert found.level == level and words in found.follows


def test_without_an_account_where_one_is_needed_nothing_runs():
    refused = slurm_findings.slurm_findings(slurm_findings.config_of(CONFIG), [])
    assert [finding.name for finding in refused if finding.level == "bad"] == ["account"]


def test_written_profile_loads_and_follows_from_the_findings(tmp_path):
    made = doctor.Report([*site(), *node_findings.of_node(SEEN)])
    doctor.write_profile(made, tmp_path / "mine.toml")
    loaded = sites.load(str(tmp_path / "mine.toml"))
    assert loaded == Profile(
        name="mine",
        scheduler="slurm",
        account="nlp",
        network="a100-hdr-infiniband",
        network_table=network.named("a100-hdr-infiniband"),
        gpu="a100",
        partition="a100",
        gpu_type="a100",
        gpus_per_node=8,
        mem_gb=1004,
        max_nodes=3,
        max_minutes=2880,
        exclusive=True,
        gpu_memory_gb=85.1,
        environment={"NCCL_IB_HCA": "=mlx5_0,mlx5_1,mlx5_2,mlx5_3"},
    )
    text = (tmp_path / "mine.toml").read_text()
    assert 'network = "a100-hdr-infiniband"  # Node g1: fabric = InfiniBand 200 Gb/s' in text
    with pytest.raises(ConfigError, match="exists already"):
        doctor.write_profile(made, tmp_path / "mine.toml")
    with pytest.raises(ConfigError, match=r"try .*mine2\.toml"):
        doctor.write_profile(made, tmp_path / "mine2")


def test_a_name_from_the_site_can_t_break_out_of_the_profile(tmp_path):
    odd = 'a"\n[container]\nruntime = "apptainer" # \\'
    report = doctor.Report([Finding("Partitions", "x", odd, "", "ok", {"partition": 'a"b\\', "gpus_per_node": 0})])
    doctor.write_profile(report, tmp_path / "mine.toml")
    loaded = sites.load(str(tmp_path / "mine.toml"))
    assert (loaded.partition, loaded.gpus_per_node, loaded.container.runtime) == ('a"b\\', 0, "none")


@pytest.mark.parametrize(
    "gres, expected",
    [
        ("gpu:8", ("", 8)),
        ("gpu:a100:8(S:0-1),nic:1", ("a100", 8)),
        ("nic:1,gpu:h800:4", ("h800", 4)),
        ("(null)", ("", 0)),
        ("gpu:v100:2,gpu:a100:6", ("a100", 6)),
        ("gpux:8", ("", 0)),
    ],
)
def test_gpus_of_a_node(gres, expected):
    assert slurm_findings.gpus_of(gres) == expected


# ---- the node ----


def test_a_good_node_has_nothing_bad():
    assert [finding for finding in judged({}).values() if finding.level == "bad"] == []
    assert judged({})["GPUs"].value == "1 x NVIDIA A100-SXM4-80GB, 80 GiB"


@pytest.mark.parametrize(
    "changes, name, words",
    [
        ({"canary": "No such file or directory"}, "shared folder", "does not see this folder"),
        (
            {"gpus": [{"name": "A100", "memory_gb": 80, "mig": True, "used_mb": 0, "ours": True}]},
            "MIG",
            "ask for whole ones",
        ),
        (
            {"gpus": [{"name": "A100", "memory_gb": 80, "mig": False, "used_mb": 70000, "ours": True}]},
            "GPU memory",
            "another's process",
        ),
        ({"torch": {"error": "not installed"}}, "torch", "slurm/container"),
        (
            {"torch": {"version": "2.13.0+cpu", "cuda": None, "available": False, "nccl": None, "gpus": []}},
            "torch",
            "CPU build",
        ),
        ({"packages": {"megatron-core": "0.15.0"}}, "megatron-core", "pip install megatron-core==0.16.1"),
        (
            {"packages": {"megatron-core": "0.16.1", "transformer-engine": "2.12.0"}},
            "Transformer Engine",
            ">=2.9,<2.12",
        ),
        (
            {"packages": {"megatron-core": "0.16.1", "transformer-engine": "2.8.0+abc"}},
            "Transformer Engine",
            ">=2.9,<2.12",
        ),
        ({"locked_memory": 65536}, "locked memory", "MEMLOCK"),
        ({"shm_gb": 0}, "/dev/shm", "too small"),
    ],
)
def test_what_will_fail_on_a_node(changes, name, words):
    found = judged(changes)[name]
    assert found.level == "bad" and words in found.follows


@pytest.mark.parametrize(
    "changes, name, words",
    [
        ({"address": "127.0.1.1"}, "host name", 'GLOO_SOCKET_IFNAME = "eth0"'),
        ({"address": ""}, "host name", "GLOO_SOCKET_IFNAME"),
        ({"ports": [15000, 65000]}, "ephemeral ports", "ip_local_reserved_ports"),
        ({"adapters": []}, "fabric", "TCP"),
        ({"torch": {**SEEN["torch"], "nccl": "2.19.3"}}, "NCCL", "NCCL_IB_GID_INDEX"),
    ],
)
def test_what_to_know_of_a_node(changes, name, words):
    found = judged(changes)[name]
    assert found.level == "note" and words in found.follows


@pytest.mark.parametrize(
    "gpu, layer, gbps, table",
    [
        ("NVIDIA H800", "Ethernet", 400, "h800-roce"),
        ("NVIDIA H800", "InfiniBand", 400, "h800-ndr-infiniband"),
        ("NVIDIA A100-SXM4-80GB", "InfiniBand", 200, "a100-hdr-infiniband"),
        ("NVIDIA A100-SXM4-80GB", "Ethernet", 100, "auto"),
    ],
)
def test_the_fabric_chooses_the_network_s_table(gpu, layer, gbps, table):
    found = judged(
        {
            "gpus": [{"name": gpu, "memory_gb": 80, "mig": False, "used_mb": 0, "ours": True}],
            "adapters": [{"name": "mlx5_0", "layer": layer, "gbps": gbps, "active": True}],
        }
    )
    assert found["fabric"].settings == {"network": table}


# ---- apex, on real packages in a folder ----


def apex_in(folder: Path, files: dict[str, str]) -> dict:
    """node.py's word on ``apex``, from a process of its own that sees ``folder``; importing it
    would end that process."""
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    done = subprocess.run(
        [sys.executable, "-c", "import json, node_probe; print(json.dumps(node_probe.apex()))"],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": f"{folder}:{ROOT / 'launcher/slurm'}"},
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


BOMB = "import os\nos._exit(99)\n"
PYPI = {
    "apex/__init__.py": BOMB,
    "apex/models.py": "",
    "apex-0.9.10.dev0.dist-info/METADATA": "Metadata-Version: 2.1\nName: apex\nVersion: 0.9.10.dev0\nSummary: "
    "Pyramid toolkit to add Velruse, Flash Messages\n",
}
NVIDIA = {
    "apex/__init__.py": BOMB,
    "apex/optimizers/fused_adam.py": BOMB,
    "apex-0.1.dist-info/METADATA": "Metadata-Version: 2.1\nName: apex\nVersion: 0.1\nSummary: PyTorch Extensions "
    "written by NVIDIA\n",
}


def test_pypi_s_apex_is_told_from_nvidia_s_without_importing_it(tmp_path):
    other = apex_in(tmp_path / "a", PYPI)
    assert (other["kind"], other["version"]) == ("other", "0.9.10.dev0")
    finding = judged({"apex": other})["apex"]
    assert (
        finding.level == "bad"
        and "not NVIDIA's (Pyramid toolkit" in finding.follows
        and "pip uninstall apex" in finding.follows
    )
    plain = apex_in(tmp_path / "b", NVIDIA)
    assert plain["kind"] == "nvidia" and judged({"apex": plain})["apex"].level == "note"
    built = apex_in(tmp_path / "c", {**NVIDIA, "amp_C.py": BOMB})
    assert built["extensions"] == ["amp_C"] and judged({"apex": built})["apex"].level == "ok"
    assert apex_in(tmp_path / "d", {"x.py": ""})["kind"] == "absent"
    assert apex_in(tmp_path / "e", {"apex/notes.txt": ""})["kind"] == "other", (
        "a folder of that name would be imported as well"
    )


def test_the_image_s_check_refuses_what_doctor_calls_bad_or_lacks(tmp_path):
    sys.path.insert(0, str(ROOT / "slurm/container"))
    try:
        from check import problems
    finally:
        sys.path.pop(0)
    built = {"kind": "nvidia", "where": "x", "version": "0.1", "summary": "", "extensions": ["amp_C"]}
    assert problems("all", {**SEEN, "apex": built}) == []
    assert "apex" in problems("apex", SEEN)[0] and problems("engine", SEEN) == []
    assert "Transformer Engine" in problems("engine", {**SEEN, "packages": {"transformer-engine": "2.14.0"}})[0]


# ---- this machine ----


def test_file_system_of_the_longest_mount():
    mounts = (
        "22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw\n30 22 0:40 / /home rw shared:2 - nfs4 server:/home rw\n"
        "31 22 0:41 / /home/with\\040space rw - lustre x rw\n"
    )
    assert [
        machine_findings.file_system(Path(path), mounts) for path in ("/etc", "/home/x", "/homes", "/home/with space/y")
    ] == ["ext4", "nfs4", "ext4", "lustre"]
    assert [machine_findings.shared_folder(Path("/x"), kind, 1).level for kind in ("lustre", "xfs", "new")] == [
        "ok",
        "note",
        "note",
    ]


def test_the_shell_s_variables_are_named_and_no_key_is_shown():
    said = machine_findings.shell(
        {
            "SBATCH_PARTITION": "x",
            "WANDB_API_KEY": "hunter2hunter2",
            "SLURM_JOB_ID": "7",
            "TOKENIZERS_PARALLELISM": "false",
        }
    )
    assert [finding.name for finding in said] == ["the shell's variables", "keys in the shell", "inside a job"]
    assert "hunter2" not in str(said) and said[1].value == "WANDB_API_KEY"


def test_without_slurm_it_says_so_and_writes_no_profile(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    report = doctor.examine(None, None, False, 1)
    assert (
        report.findings[0].follows == "no sbatch on PATH: stages run here, one after the other (profile local)"
        and not report.bad
    )
    with pytest.raises(ConfigError, match="nothing to write"):
        doctor.write_profile(report, tmp_path / "mine.toml")


def test_node_s_word_is_complete_and_every_finding_says_what_follows(monkeypatch):
    # its import takes seconds; the test on a real node does it
    monkeypatch.setattr(node_probe, "TORCH", "raise SystemExit(1)")
    seen = {**node_probe.main([]), "torch": SEEN["torch"]}
    for finding in [*node_findings.of_node(seen), *machine_findings.here(ROOT, ""), *site()]:
        assert finding.level in doctor.STYLES and finding.follows and finding.value, finding
        assert set(finding.settings) <= {field.name for field in dataclasses.fields(Profile)}


def test_a_slurm_that_lacks_keys_is_described_all_the_same():
    """Versions differ in what scontrol prints; nothing of it is needed for the rest."""
    partitions = slurm_findings.partitions_of(
        "PartitionName=main State=UP\nPartitionName=odd MaxTime=x MaxNodes=? GraceTime=(null)\n",
        "n1|main*|gpu:2|N/A|8|idle|\n",
    )
    found = slurm_findings.slurm_findings({}, []) + slurm_findings.partition_findings(partitions, partitions[0], True)
    assert {one.name for one in found} >= {"version", "cluster", "KillWait", "MaxArraySize"}
    assert next(one for one in found if one.name == "version").value == "unknown"
