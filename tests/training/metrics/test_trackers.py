"""W&B offline and MLflow in a folder, the real packages where they are installed; what is refused
without them."""

import importlib.util
import json
import os
from dataclasses import replace

import pytest

from tests.support.distributed import run
from tests.support.ppo_settings import settings
from training import sft
from training.errors import ConfigError
from training.metrics import trackers


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"wandb": "online"}, "wandb = .online. needs WANDB_API_KEY in the environment"),
        ({"mlflow": "http://me:secret@host:5000"}, "mlflow: a user name or password in the address"),
        ({"mlflow": "http://token@host:5000"}, "mlflow: a user name or password in the address"),
        ({"wandb": "offline"}, "wandb = 'offline': the package is not installed .*; python -m pip install wandb, or"),
        ({"mlflow": "/tmp/x"}, "python -m pip install mlflow-skinny, or"),
    ],
)
def test_a_tracker_that_can_t_work_is_refused_before_training(values, message, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    missing = "not installed" in message or "pip install" in message
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if missing else object())
    with pytest.raises(ConfigError, match=message):
        trackers.check(settings(**values))
    with pytest.raises(ValueError, match="wandb = 'yes': expected one of off, online, offline"):
        settings(wandb="yes")


def test_this_machine_is_excepted_from_the_sites_proxy(monkeypatch):
    for before, after in (
        ("", "localhost,127.0.0.1,::1"),
        ("a.site, localhost", "a.site,localhost,127.0.0.1,::1"),
        ("*", "*"),
    ):
        monkeypatch.delenv("no_proxy", raising=False)
        monkeypatch.setenv("NO_PROXY", before)
        trackers.reach_loopback_directly()
        assert os.environ["NO_PROXY"] == after and os.environ.get("no_proxy", "*") == after
    monkeypatch.setenv("http_proxy", "http://me:geheim@proxy:3128")
    monkeypatch.setenv("no_proxy", "near")
    said = trackers._proxy(settings(mlflow="http://far:5000"), "mlflow")
    assert (
        "the proxy http://proxy:3128 of http_proxy" in said
        and trackers._proxy(settings(mlflow="http://near:5000"), "mlflow") == ""
    )


def test_nothing_is_asked_for_nothing_is_imported(tmp_path):
    config = settings()
    config = replace(config, paths=replace(config.paths, output=str(tmp_path)))
    trackers.check(config)
    assert trackers.start(config) == [] and not list(tmp_path.iterdir())


def losses(stage) -> list[float]:
    return [json.loads(line)["loss"] for line in (stage / "metrics.jsonl").read_text().splitlines()]


def test_mlflow_has_the_numbers_of_both_attempts_in_one_run(small_run, tmp_path, monkeypatch, capfd):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_ALLOW_FILE_STORE", raising=False)
    run(sft.run, 1, 1, 1, small_run.sft(tmp_path / "refused", iterations=1, mlflow=f"file://{tmp_path}/store"))
    assert (
        "warning: mlflow does not answer, the run goes on without it: The filesystem tracking backend"
        in capfd.readouterr().out
    )
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    stage, store = tmp_path / "sft", f"file://{tmp_path}/store"
    for iterations in (2, 4):
        run(sft.run, 1, 1, 1, small_run.sft(stage, iterations=iterations, schedule="constant", mlflow=store))
    client = mlflow.MlflowClient(store)
    experiment = client.get_experiment_by_name("convoy").experiment_id
    (found,) = client.search_runs([experiment])
    history = sorted(client.get_metric_history(found.info.run_id, "loss"), key=lambda metric: metric.step)
    assert [metric.value for metric in history] == pytest.approx(losses(stage)) and len(history) == 4
    assert found.data.params["lr"] == "0.001" and found.info.status == "FINISHED"


def test_wandb_writes_an_offline_run_that_names_the_stage(small_run, tmp_path):
    pytest.importorskip("wandb")
    stage = tmp_path / "sft"
    for iterations in (2, 4):
        run(sft.run, 1, 1, 1, small_run.sft(stage, iterations=iterations, schedule="constant", wandb="offline"))
    made = sorted(stage.glob("wandb/offline-run-*/run-*.wandb"))
    number = json.loads((stage / "trackers.json").read_text())["wandb"]
    assert len(made) == 2 and all(path.name == f"run-{number}.wandb" for path in made)
    assert b"heldout_perplexity" in made[-1].read_bytes()
