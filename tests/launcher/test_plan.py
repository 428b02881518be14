"""What plan shows, as text; the parts of a sweep that need no Slurm; the script of an array in
full."""

import json
import os
import subprocess
from pathlib import Path

import pytest
from rich.console import Console

from launcher import plan
from launcher.checks import disk
from launcher.config.sections import Profile
from launcher.config.stages import PIPELINES
from launcher.run.folder import Run, this_process
from launcher.slurm import sites
from launcher.submit import create, sweep, test_only
from tests.support.stub_project import SMALL
from training.errors import ConfigError

GRAPH = """\
stage | after | runs | nodes x ranks | limit, h | GPU-hours | layout | writes
sft | convert | training.sft | 1 + 1 spare x 8 | 4 | 64 | TP 4 x PP 1 x DP 2, batch 128 = 8 x 2 x 8 | 158 MB
reward | sft | training.reward | 1 x 8 | 12 | 96 | TP 4 x PP 1 x DP 2, batch 128 = 4 x 2 x 16 | 158 MB
rlhf | sft, reward | training.ppo | 1 x 8 | 24 | 192 | TP 4 x PP 1 x DP 2, batch 128 = 2 x 2 x 32 | 316 MB
352 GPU-hours, one job a stage at its time limit; profile local: as asked
"""
SITE = Profile(name="site", scheduler="slurm")
HERE = Profile(name="local", scheduler="local", max_nodes=2, max_minutes=10_000)
CASES = """\
case "$SLURM_ARRAY_TASK_ID" in
  0) run=runs/lr/0 ;;  # sft.lr=1e-05, rlhf.kl_coef=0.01
  1) run=runs/lr/1 ;;  # sft.lr=1e-05, rlhf.kl_coef=0.05
  2) run=runs/lr/2 ;;  # sft.lr=2e-05, rlhf.kl_coef=0.01
  3) run=runs/lr/3 ;;  # sft.lr=2e-05, rlhf.kl_coef=0.05
  *) echo "element $SLURM_ARRAY_TASK_ID is none of this sweep" >&2; exit 64 ;;
esac
"""


@pytest.fixture
def nowhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def planned(
    nowhere, *sets, recipe="bloom-tiny", profile=HERE, target="full-pipeline", first=None, last=None
) -> create.Plan:
    return create.plan(request(target, recipe, profile, name="x", sets=sets, first=first, last=last))


def request(target="full-pipeline", recipe="bloom-tiny", profile=HERE, runs=Path("runs"), **options):
    return create.SubmitRequest(target, recipe, runs, profile, "as asked", **options)


def shown(made, **more) -> str:
    """What is printed, without the lines of tables."""
    out = Console(width=220, record=True, file=open("/dev/null", "w"))  # noqa: SIM115 - nothing is written
    plan.show(made, more.get("starts", {}), out, more.get("scripts", {}))
    lines = [
        line.strip("┃│ ").replace("┃", "│") for line in out.export_text().splitlines() if not set(line) & set("┏┡└├")
    ]
    return "".join(" | ".join(cell.strip() for cell in line.split("│")) + "\n" for line in lines)


def test_graph_with_gpu_hours_layout_and_disk(nowhere):
    sets = ["model.demo_heads=8", "model.demo_hidden=256", "rlhf.rollout_batch_size=128", "resources.sft.spares=1"]
    for stage, batch, minutes in (("sft", 8, 240), ("reward", 4, 720), ("rlhf", 2, 1440)):
        sets += [
            f"{stage}.{key}"
            for key in (
                "tensor_parallel=4",
                "pipeline_parallel=1",
                f"micro_batch_size={batch}",
                "global_batch_size=128",
                "iterations=300",
                "save_every=100",
                "keep_checkpoints=2",
            )
        ]
        sets += [f"resources.{stage}.gpus_per_node=8", f"resources.{stage}.minutes={minutes}"]
    made = planned(nowhere, *sets, last="rlhf")
    made.stages.pop(0)
    assert shown(made).startswith("runs/x\n" + GRAPH)


def test_memory_names_each_model_and_its_parts(nowhere):
    said = shown(planned(nowhere, "model.demo_hidden=768", "model.demo_vocab=250880"))
    for model in ("policy", "value", "reference", "reward"):
        assert f"rlhf | {model} | " in said
    assert (
        "fp32 gradients" in said
        and "logits and loss" in said
        and "disk: about" in said
        and "data: generated demo data" in said
    )


def test_starts_are_slurm_s_for_the_first_stage_and_after_its_parents_for_the_others(nowhere):
    made = planned(nowhere, profile=sites.load("dev"))
    said = "sbatch: Job 11 to start at 2026-11-23T23:43:25 using 2 processors on nodes n[1-2] in partition main\n"
    starts = dict.fromkeys(PIPELINES["ppo"], test_only.parse_start(said))
    assert starts["sft"] == test_only.ExpectedStart("2026-11-23T23:43:25", "n[1-2]")
    said = shown(made, starts=starts)
    assert "2026-11-23 23:43:25" in said and "after sft, reward" in said and said.count("2026-11-23") == 1


def test_two_plans_of_a_new_run_write_nothing_and_carry_the_run_s_name(nowhere):
    made = planned(nowhere, profile=sites.load("dev"))
    texts = create.render_all(made)
    assert list(texts) == list(PIPELINES["ppo"]) and f"#SBATCH --job-name={made.identity['id']}.sft" in texts["sft"]
    assert list(nowhere.iterdir()) == []


def test_combinations_of_a_sweep():
    assert sweep.combinations(["sft.lr=1e-5,2e-5"]) == [{"sft.lr": 1e-5}, {"sft.lr": 2e-5}]
    assert len(sweep.combinations(["sft.lr=1e-5,2e-5", "rlhf.kl_coef=0.01,0.02,0.05"])) == 6
    assert sweep.combinations(['sft.schedule="linear",cosine'])[1] == {"sft.schedule": "cosine"}
    assert sweep.combinations(["data.source=2024-01-01,2024-01-02"])[0] == {"data.source": "2024-01-01"}, "no date"


def test_a_sweep_over_texts_with_line_breaks_commas_and_marks_is_one_line_each(nowhere):
    """The default template's form; as a comment of the script it would end the line and be run."""
    texts = [
        "\n\nHuman: {question}\n\nAssistant:",
        'Q, "x": {question}\ttouch harmed',
        "\u00fc \U0001f600 $(touch harmed) {question}",
    ]
    swept = f"mtbench.template={','.join(sweep.in_toml(text) for text in texts)}"
    assert [one["mtbench.template"] for one in sweep.combinations([swept])] == texts
    made = sweep.plan(request(profile=SITE, name="lr"), [swept])
    assert [one.tables["mtbench"]["template"] for one in made.plans] == texts
    script = sweep.scripts(made)["mtbench"]
    case = script[script.index("case ") : script.index("esac") + 5]
    for index in range(3):
        command = ["bash", "-c", f"SLURM_ARRAY_TASK_ID={index}\n{case}\necho $run"]
        done = subprocess.run(command, capture_output=True, text=True, cwd=nowhere)
        assert done.stdout == f"runs/lr/{index}\n" and not done.stderr
    assert not (nowhere / "harmed").exists()


@pytest.mark.parametrize("character", ["\x1b", "\r", "\x0b", "\u2028", "\x00"])
def test_a_script_with_a_character_that_hides_or_ends_a_line_is_refused(nowhere, character):
    made = planned(nowhere, profile=Profile(name="site", scheduler="slurm", setup=[f"true {character} false"]))
    with pytest.raises(
        ConfigError, match="line [0-9]+ of the batch script has a character that can't be printed|line break"
    ):
        plan.scripts_of(made)


@pytest.mark.parametrize(
    "texts, message",
    [
        (["sft.lr"], "expected section.key=VALUE,VALUE"),
        (["sft.lr=1e-5"], "two or more different values"),
        (["sft.lr=1e-5,0.00001"], "two or more different values"),
        (["resources.sft.nodes=1,2"], "share section resources"),
        (["sft.lr=1,2", "sft.lr=3,4"], "sft.lr is swept twice"),
        (
            ["sft.seed=" + ",".join(map(str, range(40))), "rlhf.seed=" + ",".join(map(str, range(40)))],
            "1600 combinations; at most 1000",
        ),
    ],
)
def test_sweep_that_is_none(texts, message):
    with pytest.raises(ConfigError, match=message):
        sweep.combinations(texts)


def test_script_of_an_array_shows_which_index_is_which_run(nowhere):
    with pytest.raises(ConfigError, match="sft starts from convert, not DONE"):
        sweep.plan(request("sft", profile=SITE, name="lr"), ["sft.lr=1e-5,2e-5"])
    made = sweep.plan(request(profile=SITE, name="lr", last="sft"), ["sft.lr=1e-5,2e-5", "rlhf.kl_coef=0.01,0.05"])
    texts = sweep.scripts(made)
    assert list(texts) == ["convert", "sft"] and CASES in texts["sft"]
    assert "#SBATCH --output=runs/lr/%a/sft/logs/slurm-%A_%a.out\n" in texts["sft"]
    assert texts["sft"].splitlines()[-1].endswith('run_module.py launcher.job.supervise "$run" sft')
    assert made.plans[3].identity["id"] == f"{made.identity}.3" and made.plans[3].identity["sweep"] == {
        "id": made.identity,
        "index": 3,
    }


def test_a_stage_in_a_partition_of_its_own_is_shown_and_rendered_in_a_sweep_too(nowhere):
    site = Profile(name="site", scheduler="slurm", partition="main", options={"nice": 10})
    own = ["resources.sft.partition=low", "resources.sft.options.nice=100", "resources.convert.partition=main"]
    made = planned(nowhere, *own, profile=site, last="sft")
    lines = shown(made)
    assert "sft: sbatch --partition=low --nice=100, where the profile has --partition=main --nice=10" in lines
    assert "convert: sbatch" not in lines, "the profile's own partition"

    swept = sweep.plan(request(profile=site, name="lr", sets=tuple(own), last="sft"), ["sft.lr=1e-5,2e-5"])
    for texts in (plan.scripts_of(made), sweep.scripts(swept)):
        assert "--partition=main\n" in texts["convert"] and "--nice=10\n" in texts["convert"]
        assert "--partition=low\n" in texts["sft"] and "--nice=100\n" in texts["sft"]


def test_sweep_here_runs_one_element_after_the_other_and_prepares_the_data_once(project):
    project.behave(sft={"fail_in": "0", "fail_at": 2})
    arguments = [
        "submit",
        "full-pipeline",
        "--name",
        "lr",
        "--profile",
        "local",
        "--until",
        "sft",
        "--sweep",
        "sft.lr=1e-5,2e-5",
        *SMALL,
    ]
    done = project.convoy(*arguments, "--wait")
    assert done.returncode == 1, done.stdout + done.stderr
    assert (project.folder / "prepared").read_text() == "once\n"
    rows = json.loads(project.convoy("status", "lr", "--json").stdout)[0]["runs"]
    assert [(row["values"], row["state"]) for row in rows] == [({"sft.lr": 1e-5}, "failed"), ({"sft.lr": 2e-5}, "idle")]
    assert rows[1]["numbers"]["sft.loss"] == pytest.approx(1 / 3)
    Run(project.folder / "runs/lr/1").record("runner", stages=["sft"], **this_process())
    assert "runs/lr/1 is being worked on by a local runner" in project.convoy(*arguments).stdout
    other = project.convoy(*[word.replace("2e-5", "3e-5") for word in arguments])
    assert other.returncode == 2 and "was submitted with another sweep: sft.lr=1e-05; sft.lr=2e-05" in other.stderr


def test_what_a_sweep_has_on_the_disk_is_not_asked_for_again(nowhere, monkeypatch):
    """The same command once more, when the elements' checkpoints are written and little is free."""

    def again():
        return sweep.plan(request(name="lr"), ["sft.lr=1e-5,2e-5"])

    needed = sum(sum(one.checked.disk.values()) for one in again().plans)
    monkeypatch.setattr(disk, "free_space", lambda folder: disk.FreeSpace(0.9 * needed, "free"))
    with pytest.raises(ConfigError, match="but only .* are free"):
        again()
    for index in range(2):
        (nowhere / f"runs/lr/{index}/sft").mkdir(parents=True)
        (nowhere / f"runs/lr/{index}/sft/checkpoint").touch()
        os.truncate(nowhere / f"runs/lr/{index}/sft/checkpoint", int(0.4e9 * needed))
    assert len(again().plans) == 2


def test_a_key_that_is_swept_and_set_is_refused():
    sweep.refuse_set_twice(["sft.lr=1e-4,2e-4"], ["sft.seed=1"])
    with pytest.raises(ConfigError, match="sft.lr stands in --sweep and in --set; give it once"):
        sweep.refuse_set_twice(["sft.lr=1e-4,2e-4"], ["sft.seed=1", "sft.lr = 3e-4"])
