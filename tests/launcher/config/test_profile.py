"""A site's profile: what it may say, containers as text, secrets files, and where profiles are
found."""

import base64
import html
import json
import os
import shutil
import subprocess
import sys
import urllib.parse
from pathlib import Path

import pytest

from launcher.config import key_file
from launcher.config.sections import Profile, Resources
from launcher.slurm import container, network, site_files, sites
from tests.support.stub_project import ROOT
from training.config.schema import build
from training.errors import ConfigError


def profile(**values) -> Profile:
    return build(Profile, {"name": "site", "scheduler": "slurm", **values}, "profile site")


@pytest.mark.parametrize(
    "values, message",
    [
        ({"options": {"signal": "USR2@60"}}, r"options\.signal: the launcher sets it; use signal_lead_s"),
        ({"options": {"account": "x"}}, r"options\.account: the launcher sets it; use account"),
        ({"options": {"wrap": "id"}}, r"options\.wrap: it would change what the job runs"),
        ({"options": {"export": "NONE"}}, "would change what the job runs"),
        ({"options": {"-p": "x"}}, "expected a long option of sbatch without its dashes"),
        ({"options": {"a b": "x"}}, "expected a long option"),
        ({"options": {"nice": 1.5}}, "expected a string, a number, or true"),
        ({"options": {"contiguous": False}}, "leave the line out"),
        ({"environment": {"WANDB_API_KEY": "x"}}, r"environment\.WANDB_API_KEY.*secrets = "),
        ({"environment": {"A B": "x"}}, "letters, digits"),
        ({"environment": {"A": "x\ny"}}, "line break"),
        ({"setup": ["export OPENAI_API_KEY=sk-1"]}, "setup sets OPENAI_API_KEY.*secrets = "),
        ({"container": {"runtime": "docker"}}, "expected one of none, pyxis, apptainer"),
        ({"container": {"runtime": "pyxis"}}, "needs the image"),
        ({"container": {"runtime": "pyxis", "image": "x", "mounts": ["data"]}}, "expected an absolute path"),
        ({"container": {"runtime": "pyxis", "image": "x", "mounts": ["/a,/etc:/etc"]}}, "no commas"),
        ({"container": {"runtime": "pyxis", "image": "x\n--export=ALL"}}, "line break"),
        (
            {"container": {"runtim": "pyxis"}},
            r"container\.runtim: no such key; did you mean profile site\.container\.runtime",
        ),
        (
            {"scheduler": "local", "container": {"runtime": "apptainer", "image": "x.sif"}},
            "start the launcher itself inside",
        ),
        ({"max_nodes": 0}, "max_nodes = 0: expected at least 1"),
    ],
)
def test_a_mistake_in_a_profile_says_its_fix(values, message):
    with pytest.raises(ConfigError, match=message):
        profile(**values)


def test_spares_count_against_the_site_s_nodes():
    sites.check_fits(profile(max_nodes=3), "sft", Resources(nodes=2, spares=1))
    with pytest.raises(ConfigError, match=r"spares = 2: with 2 nodes.*--set resources\.sft\.spares=1 or less"):
        sites.check_fits(profile(max_nodes=3), "sft", Resources(nodes=2, spares=2))


def test_pyxis_gets_mounts_and_the_image_s_python(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    site = profile(
        container={"runtime": "pyxis", "image": "/images/convoy.sqsh", "mounts": ["/models", "/data:/data:ro"]}
    )
    assert container.srun_options(site, ["NCCL_DEBUG", "MASTER_PORT"]) == [
        "--container-image=/images/convoy.sqsh",
        f"--container-mounts={tmp_path}:{tmp_path},/models:/models,/data:/data:ro",
        f"--container-workdir={tmp_path}",
        "--no-container-mount-home",
        "--no-container-entrypoint",
        "--container-env=NCCL_DEBUG,MASTER_PORT",
    ]
    assert container.inside(site, ["/venv/bin/python", "-m", "training.sft"]) == ["python", "-m", "training.sft"]


def test_apptainer_wraps_the_command_and_its_environment_wins(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    box = {"runtime": "apptainer", "image": "convoy.sif", "mounts": ["/data:/data:ro"], "python": "/opt/python"}
    site = profile(container=box)
    assert container.srun_options(site) == []
    assert container.inside(site, ["python", "-m", "training.sft"]) == [
        "apptainer",
        "exec",
        "--nv",
        "--no-home",
        "--bind",
        f"{tmp_path}:{tmp_path}",
        "--bind",
        "/data:/data:ro",
        "--pwd",
        str(tmp_path),
        "convoy.sif",
        "/opt/python",
        "-m",
        "training.sft",
    ]
    assert "--nv" not in container.inside(profile(container=box, device="cpu"), ["python"])
    assert container.passed_on(site, {"A": "b"}) == {"A": "b", "APPTAINERENV_A": "b"}


def test_what_the_container_does_not_see_is_named_with_its_mount(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to("/models/bloom")
    site = profile(container={"runtime": "apptainer", "image": "x.sif", "mounts": ["/data:/data:ro", "/scratch:/work"]})
    container.check_seen(
        site, {"--runs": Path("runs/x"), "model.checkpoint": Path("/data/bloom"), "questions": Path("/work/x")}
    )
    for path in ("/models/bloom", "/scratch/x", "../elsewhere", "link"):
        with pytest.raises(ConfigError, match=f"model.checkpoint = '{path}': .* is not seen from inside.*mounts = "):
            container.check_seen(site, {"model.checkpoint": Path(path)})
    container.check_seen(profile(), {"model.checkpoint": Path("/models/bloom")})


def test_a_profile_survives_the_run_s_config_json():
    import dataclasses
    import json

    site = profile(container={"runtime": "pyxis", "image": "x"}, options={"nice": 1}, slurm="23.11.4")
    assert Profile(**json.loads(json.dumps(dataclasses.asdict(site)))) == site and site.version == (23, 11)


# ---- secrets ----


def env_file(folder, text, mode=0o600):
    path = folder / "keys.env"
    path.write_text(text)
    path.chmod(mode)
    return path


def test_secrets_are_read_and_masked(tmp_path):
    path = env_file(
        tmp_path, "# W&B\n\nWANDB_API_KEY=0123456789abcdef\nexport JUDGE_KEY='sk-a=b c#d'\nQUOTED=\"12345678\"\n"
    )
    keys = key_file.read(path)
    assert keys == {"WANDB_API_KEY": "0123456789abcdef", "JUDGE_KEY": "sk-a=b c#d", "QUOTED": "12345678"}
    assert key_file.mask("key 0123456789abcdef, sk-a=b c#d!", keys) == "key ********, ********!"
    assert key_file.names(profile(secrets=str(path))) == tuple(keys) and key_file.names(profile()) == ()


@pytest.mark.parametrize(
    "text, mode, message",
    [
        ("A=hunter2hunter2", 0o644, "mode 644.*chmod 600"),
        ("A=hunter2hunter2", 0o620, "mode 620"),
        ("hunter2hunter2", 0o600, "line 1: expected KEY=VALUE"),
        ("\nA-B=hunter2hunter2", 0o600, "line 2: expected KEY=VALUE"),
        ("PATH=hunter2hunter2", 0o600, "PATH is set by the launcher"),
        ("SLURM_JOB_ID=hunter2hunter2", 0o600, "is set by the launcher"),
        ("A=hunter2", 0o600, "value of A has 7 characters"),
        ("A=hunter2hunter2\x07", 0o600, "all printable"),
    ],
)
def test_a_bad_secrets_file_is_refused_without_its_values(tmp_path, text, mode, message):
    with pytest.raises(ConfigError, match=message) as caught:
        key_file.read(env_file(tmp_path, text, mode))
    assert "hunter2" not in str(caught.value)


def test_a_missing_secrets_file_and_a_folder_say_how_to_make_one(tmp_path):
    with pytest.raises(ConfigError, match="No such file.*install -m 600"):
        key_file.read(tmp_path / "none.env")
    with pytest.raises(ConfigError, match="Is a directory|not a file"):
        key_file.read(tmp_path)


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "keys.env", 0o600)
    with pytest.raises(ConfigError, match="not a file"):
        key_file.read(tmp_path / "keys.env")


@pytest.mark.parametrize("key", ["p+ss/w0rd&<é'\"\\ 1", "0123456789abcdef", "a%b c=d?e#fgh"])
def test_a_key_is_masked_however_it_is_written(key):
    written = [
        key,
        json.dumps({"key": key}),
        json.dumps(key, ensure_ascii=False),
        repr([key]),
        ascii(key),
        urllib.parse.quote(key),
        urllib.parse.quote_plus(key),
        urllib.parse.urlencode({"k": key}),
        html.escape(key),
        json.dumps(key).replace("/", "\\/"),
        urllib.parse.quote(key, safe="").replace("%2B", "%2b").replace("%2F", "%2f"),
    ]
    for text in written:
        masked = key_file.mask(f"a {text} b", [key])
        assert key_file.MASK in masked and len(masked) < len(f"a {text} b") + 12
        assert not any(form in masked for form in key_file.forms(key)), (text, masked)
    # of base64, a few characters at its edges hold bits of the neighbours
    for before in ("", "u:", "user:", "x"):
        encoded = base64.b64encode(f"{before}{key}:after".encode()).decode()
        masked = key_file.mask(encoded, [key])
        assert key_file.MASK in masked and len(masked.replace(key_file.MASK, "")) < len(encoded) - len(key)
    assert key_file.mask("nothing of it", [key]) == "nothing of it"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_a_secrets_file_of_another_user_is_refused(tmp_path):
    path = env_file(tmp_path, "A=hunter2hunter2")
    os.chown(path, 65534, 65534)
    with pytest.raises(ConfigError, match="belongs to user 65534"):
        key_file.read(path)


def test_profile_with_a_bad_secrets_file_is_refused_when_it_is_loaded(tmp_path):
    (tmp_path / "mine.toml").write_text(f'scheduler = "slurm"\nsecrets = "{env_file(tmp_path, "A=12345678", 0o604)}"\n')
    with pytest.raises(ConfigError, match="chmod 600"):
        sites.load(str(tmp_path / "mine.toml"))


# ---- network ----


def test_every_variable_has_a_reason_and_every_site_of_the_issue_a_table():
    names = site_files.names("networks")
    assert {"auto", "a100-hdr-infiniband", "h800-roce", "h800-ndr-infiniband"} <= set(names)
    for name in names:
        lines = network.variables(network.named(name))
        assert len({variable for variable, _, _ in lines}) == len(lines), name
        assert all(value and len(reason) > 20 for _, value, reason in lines), name


def test_auto_leaves_slow_adapters_out_and_the_profile_wins():
    found = [
        {"name": f"mlx5_{n}", "layer": "InfiniBand", "gbps": gbps, "active": active}
        for n, (gbps, active) in enumerate([(400, True), (400, True), (100, True), (400, False)])
    ]
    lines = {variable: value for variable, value, _ in network.fabric(found)}
    assert lines["NCCL_IB_HCA"] == "=mlx5_0,mlx5_1" and lines["NCCL_IB_TIMEOUT"] == "22"
    assert network.fabric(found[3:]) == [] and "NCCL_IB_HCA" not in {name for name, _, _ in network.fabric(found[:2])}
    site = Profile(
        name="mine", scheduler="slurm", network_table=network.named("h800-roce"), environment={"NCCL_IB_TC": "106"}
    )
    assert ("NCCL_IB_TC", "106", "profile mine") in network.environment(site, 8)


# ---- where profiles are ----


def test_a_profile_is_found_by_path_by_name_here_and_by_name_installed(tmp_path, monkeypatch):
    (tmp_path / "slurm/clusters").mkdir(parents=True)
    (tmp_path / "slurm/clusters/mine.toml").write_text('scheduler = "slurm"\npartition = "here"\n')
    monkeypatch.chdir(tmp_path)
    assert sites.load("mine").partition == sites.load("slurm/clusters/mine.toml").partition == "here"
    assert sites.load("a100").partition == "a100", "installed beside the package"
    with pytest.raises(ConfigError, match="there are: a100, dev,.* local, mine;"):
        sites.load("nowhere")


def test_an_installed_wheel_finds_its_profiles(tmp_path):
    """What pip makes of a wheel: packages in one folder, slurm/ below share/convoy of the prefix;
    no source tree in sight."""
    site, share = tmp_path / "site", tmp_path / "site/share/convoy"
    for package in ("launcher", "training", "conversion", "eval"):
        shutil.copytree(ROOT / package, site / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "slurm", share / "slurm", ignore=shutil.ignore_patterns("dev", "container"))
    done = subprocess.run(
        [sys.executable, "-c", "from launcher.slurm import sites; print(sites.load('h800').network, sites.CLUSTERS)"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
    )
    assert done.stdout == f"h800-roce {share}/slurm/clusters\n", done.stderr
