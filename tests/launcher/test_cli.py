"""The command line: help that teaches, errors with exit code 2, and what may be imported."""

import dataclasses
import shlex
import subprocess
import sys

import pytest
from click.testing import CliRunner

from launcher import cli
from launcher.config.profile import Profile
from launcher.slurm import network, site_files
from tests.support.stub_project import ROOT, Project

COMMANDS = ["doctor", "plan", "submit", "render", "status", "watch", "logs", "resume", "cancel", "report", "completion"]


def test_the_commands_are_these():
    assert sorted(cli.main.commands) == sorted(COMMANDS)
    assert cli.main.list_commands(None) == COMMANDS, "help lists them all, in this order"


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_each_command_has_an_example(name):
    shown = CliRunner().invoke(cli.main, [name, "--help"])
    words = shown.output.partition("\n\n")[2]
    assert shown.exit_code == 0
    assert any(line.strip().startswith((name, "xdg-open", "eval")) for line in words.splitlines()), shown.output


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["status", "absent"], "runs/absent is not a run"),
        (["submit", "full-pipeline", "--profile", "nowhere"], "--profile nowhere"),
        (["submit", "full-pipeline", "--profile", "local", "--name", "../x"], "letters, digits"),
        (["submit", "full-pipeline", "--profile", "local", "--set", "sft.lrr=1"], "did you mean sft.lr"),
        (["submit", "sft", "--profile", "local"], "convert, not DONE"),
        (["submit", "everything"], "is not one of"),
    ],
)
def test_a_mistake_exits_2_with_its_fix(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shown = CliRunner().invoke(cli.main, arguments)
    assert shown.exit_code == 2 and message in shown.output, shown.output
    assert list(tmp_path.iterdir()) == [], "nothing is written"


def test_import_of_the_command_line_is_light():
    heavy = {"torch", "transformers", "submitit", "rich", "megatron"}
    code = f"import sys, launcher.cli; print(sorted({heavy} & set(sys.modules)))"
    assert (
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        == "[]\n"
    )


def test_program_is_named_as_it_was_called():
    shown = subprocess.run(
        [sys.executable, "-m", "launcher", "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert shown.stdout.startswith("Usage: python -m launcher [OPTIONS] COMMAND")


@pytest.mark.parametrize("name", site_files.names("networks"))
def test_each_variable_has_a_reason(name):
    for variable, value, reason in network.variables(network.named(name)):
        assert variable.isupper() and value and len(reason.split()) >= 3


def test_profile_s_environment_wins_and_the_cpu_hides_the_gpus(monkeypatch, tmp_path):
    profile = Profile(
        name="mine",
        scheduler="slurm",
        network_table=network.named("h800-roce"),
        environment={"NCCL_IB_TC": "106"},
    )
    made = {name: (value, reason) for name, value, reason in network.environment(profile, 8)}
    assert (
        made["NCCL_IB_TC"] == ("106", "profile mine")
        and made["NCCL_IB_GID_INDEX"][0] == "3"
        and "CUDA_VISIBLE_DEVICES" not in made
    )
    made = {name: value for name, value, _ in network.environment(dataclasses.replace(profile, device="cpu"), 8)}
    assert made["CUDA_VISIBLE_DEVICES"] == ""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    (tmp_path / "nvidia0").touch()
    (tmp_path / "nvidiactl").touch()
    monkeypatch.setattr(network, "DEVICES", tmp_path)
    auto = [
        {name: value for name, value, _ in network.environment(dataclasses.replace(profile, device="auto"), ranks)}
        for ranks in (1, 2)
    ]
    assert "CUDA_VISIBLE_DEVICES" not in auto[0] and auto[1]["CUDA_VISIBLE_DEVICES"] == ""
    (tmp_path / "nvidia0").unlink()  # a GPU that Slurm only pretends
    assert network.environment(dataclasses.replace(profile, device="auto"), 1)[-1][:2] == ("CUDA_VISIBLE_DEVICES", "")


def completions(monkeypatch, words: str) -> list[str]:
    """What ``convoy WORDS<TAB>`` offers."""
    typed = f"convoy {words}".split(" ")
    monkeypatch.setenv("_CONVOY_COMPLETE", "fish_complete")
    monkeypatch.setenv("COMP_WORDS", " ".join(typed))
    monkeypatch.setenv("COMP_CWORD", typed[-1])
    shown = CliRunner().invoke(cli.main, [], prog_name="convoy", complete_var="_CONVOY_COMPLETE")
    return [
        line.partition(",")[2].partition("\t")[0] for line in shown.output.splitlines() if line.startswith("plain,")
    ]


@pytest.mark.parametrize(
    "words, offered",
    [
        ("sta", ["status"]),
        ("submit rl", ["rlhf"]),
        ("status h", ["hh", "hh-2"]),
        ("logs hh re", ["reward"]),
        ("submit full-pipeline --recipe bloom-7", ["bloom-7b1"]),
        ("submit full-pipeline --profile a1", ["a100"]),
        (
            "submit full-pipeline --set rlhf.kl_",
            ["rlhf.kl_coef=", "rlhf.kl_horizon=", "rlhf.kl_max=", "rlhf.kl_target="],
        ),
        ("plan full-pipeline --set resources.sft.n", ["resources.sft.nodes="]),
    ],
)
def test_tab_completes(words, offered, tmp_path, monkeypatch):
    for name in ("runs/hh/config.json", "runs/hh-2/sweep.json"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    assert completions(monkeypatch, words) == offered


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_is_code_for_the_shell(shell):
    shown = CliRunner().invoke(cli.main, ["completion", shell])
    assert shown.exit_code == 0 and "_CONVOY_COMPLETE" in shown.output and "convoy" in shown.output
    if shell == "bash":
        subprocess.run(["bash", "-n", "/dev/stdin"], input=shown.output, text=True, check=True)


def test_an_empty_name_is_no_name(tmp_path):
    """--name "$RUN" with RUN unset must not submit the recipe's own run."""
    project = Project(tmp_path)
    refused = project.convoy("submit", "full-pipeline", "--profile", "local", "--name", "")
    assert refused.returncode == 2 and "--name ''" in refused.stderr, refused.stderr
    assert not (tmp_path / "runs").exists()


def test_logs_into_head_ends_quietly(tmp_path):
    project = Project(tmp_path)
    project.behave(sft={"lines": 5_000})
    assert project.submit("--wait", "--until", "sft").returncode == 0
    shown = subprocess.run(
        f"{shlex.join(project.command('logs', 'demo', 'sft'))} | head -1",
        shell=True,
        cwd=tmp_path,
        check=False,
        env=project.environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert shown.stderr == "" and len(shown.stdout.splitlines()) == 1


def test_doctor_looks_at_where_it_is_to_write_before_it_waits_for_a_node(tmp_path):
    (tmp_path / "mine.toml").write_text("")
    refused = Project(tmp_path).convoy("doctor", "--node", "--write", "mine.toml")
    assert refused.returncode == 2 and "exists already" in refused.stderr and refused.stdout == ""
