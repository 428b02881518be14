"""Optional mirrors of metrics.jsonl: Weights & Biases (``wandb``) and MLflow (``mlflow``), imported
only where a key asks for them.

Their run is found again after a resume by ``<stage>/trackers.json``. Secrets come from the
environment alone (WANDB_API_KEY, MLFLOW_TRACKING_USERNAME, MLFLOW_TRACKING_PASSWORD,
MLFLOW_TRACKING_TOKEN), which the launcher fills from the profile's secrets file. A server that does
not answer costs a warning, not the run.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import re
import time
import urllib.request
import uuid
from dataclasses import asdict
from pathlib import Path
from urllib.parse import urlsplit

from training.config.trainers import TrainerConfig
from training.errors import ConfigError

PATIENCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}
"""Environment where it has none of its own: MLflow would try for minutes, at every iteration, while
training waits."""
LOOPBACK = ("localhost", "127.0.0.1", "::1")
PACKAGES = {"wandb": "wandb", "mlflow": "mlflow-skinny"}
"""Module -> what pip calls it."""


def check(config: TrainerConfig) -> None:
    """ConfigError, with the fix, where a tracker that is asked for can't work. Imports nothing."""
    try:
        login = "@" in urlsplit(config.mlflow).netloc
    except ValueError as error:
        raise ConfigError(
            f"mlflow: not an address ({error}); expected one such as http://host:5000 or file:///folder"
        ) from None
    if login:  # first: other errors quote the address
        raise ConfigError(
            "mlflow: a user name or password in the address would be written into config.json; put it into "
            "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD (profile: secrets)"
        )
    requested = {"wandb": config.wandb != "off", "mlflow": bool(config.mlflow)}
    for module, package in PACKAGES.items():
        if requested[module] and importlib.util.find_spec(module) is None:
            raise ConfigError(
                f"{module} = {getattr(config, module)!r}: the package is not installed where the ranks run; "
                f"python -m pip install {package}, or leave the key out"
            )
    if config.wandb == "online" and not os.environ.get("WANDB_API_KEY"):
        raise ConfigError(
            'wandb = "online" needs WANDB_API_KEY in the environment (profile: secrets); or wandb = "offline", and '
            "later: wandb sync STAGE/wandb/offline-run-*"
        )


def start(config: TrainerConfig) -> list[Wandb | Mlflow]:
    """The trackers that ``config`` asks for and that answer; on one rank only."""
    file = Path(config.paths.output) / "trackers.json"
    runs = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    requested = [("wandb", Wandb)] * (config.wandb != "off") + [("mlflow", Mlflow)] * bool(config.mlflow)
    trackers: list[Wandb | Mlflow] = []
    for variable, value in PATIENCE.items():
        os.environ.setdefault(variable, value)
    if requested:
        reach_loopback_directly()
    for module, kind in requested:
        package = importlib.import_module(module)
        try:
            trackers.append(kind(package, config, runs.get(module, "")))
        except (_errors(package), OSError) as error:  # requests' errors are OSErrors
            print(
                f"warning: {module} does not answer, the run goes on without it: {error}{_proxy(config, module)}",
                flush=True,
            )
        else:
            runs[module] = trackers[-1].number
    if trackers:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(runs), encoding="utf-8")
    return trackers


def reach_loopback_directly() -> None:
    """Except this machine from the site's proxy, for the packages' own HTTP clients; what is
    excepted already stays so."""
    hosts = [
        host.strip()
        for host in (os.environ.get("no_proxy") or os.environ.get("NO_PROXY", "")).split(",")
        if host.strip()
    ]
    if "*" not in hosts:
        os.environ["no_proxy"] = os.environ["NO_PROXY"] = ",".join(
            [*hosts, *(host for host in LOOPBACK if host not in hosts)]
        )


def _proxy(config: TrainerConfig, module: str) -> str:
    """The proxy that an address goes through, for a warning that may be the proxy's fault; "" for
    none."""
    address = config.mlflow if module == "mlflow" else os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")
    parts = urlsplit(address)
    proxy = urllib.request.getproxies().get(parts.scheme, "")
    if not proxy or urllib.request.proxy_bypass(parts.hostname or ""):
        return ""
    return f" (through the proxy {re.sub(r'[^/]*@', '', proxy)} of {parts.scheme}_proxy; no_proxy excepts a host)"


def _errors(package) -> type[Exception]:
    """What the package raises when it, or its server, does not do what it should."""
    return package.errors.Error if package.__name__ == "wandb" else package.exceptions.MlflowException


def name(config: TrainerConfig) -> str:
    """RUN/STAGE, as the run folder has it."""
    return "/".join(Path(config.paths.output).resolve().parts[-2:])


class Wandb:
    """``number``: the id of a run that goes on, "" for a new one."""

    def __init__(self, wandb, config: TrainerConfig, number: str):
        self.number = number or uuid.uuid4().hex[:12]
        self.run = wandb.init(
            project=config.tracking_project,
            name=name(config),
            id=self.number,
            resume="allow",
            mode=config.wandb,
            dir=config.paths.output,
            config=asdict(config),
        )

    def log(self, iteration: int, values: dict[str, float]) -> None:
        self.run.log(values, step=iteration)

    def close(self) -> None:
        self.run.finish()


class Mlflow:
    """``number``: the id of a run that goes on, "" for a new one."""

    def __init__(self, mlflow, config: TrainerConfig, number: str):
        self.mlflow, self.client, self.number = mlflow, mlflow.MlflowClient(config.mlflow), number
        if not number:
            experiment = self.client.get_experiment_by_name(config.tracking_project)
            experiment = (
                experiment.experiment_id if experiment else self.client.create_experiment(config.tracking_project)
            )
            self.number = self.client.create_run(experiment, run_name=name(config)).info.run_id
            for key, value in asdict(config).items():
                self.client.log_param(self.number, key, value)

    def log(self, iteration: int, values: dict[str, float]) -> None:
        now = int(time.time() * 1000)
        metrics = [self.mlflow.entities.Metric(key, value, now, iteration) for key, value in values.items()]
        self._tell(self.client.log_batch, self.number, metrics)

    def close(self) -> None:
        self._tell(self.client.set_terminated, self.number)

    def _tell(self, function, *args) -> None:
        try:
            function(*args)
        except (_errors(self.mlflow), OSError) as error:
            print(f"warning: MLflow did not take the numbers: {error}", flush=True)
