"""A project folder whose stage modules are stubs: the launcher runs there unchanged, with the
commands that a user types."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
PACKAGE = (
    "from pkgutil import extend_path\n\n__path__ = extend_path(__path__, __name__)  # the real config.py lies behind\n"
)
PREPARE = """import json, os, sys
from pathlib import Path

from training.checkpoint import checksums

config = json.loads(Path(sys.argv[1]).read_text())
if Path("bad_data").exists():
    print("rows.jsonl line 7: field prompt is missing", file=sys.stderr)
    sys.exit(65)
with open("prepared", "a") as file:
    file.write("once\\n")
names = ("sft", "sft_heldout", "reward", "reward_heldout", "rlhf", "heldout")
files = {name + ".jsonl": 1 - os.path.exists("no_" + name) for name in names}
source = config["data"]["source"]
inputs = {} if source == "demo" else {"data.source": {"path": source, **checksums.mark(source)}}
read = {"rows": 9, "not read: field 'answer'": 9}
(Path(sys.argv[1]).parent / "counts.json").write_text(json.dumps({"inputs": inputs, "read": read, "files": files}))
print("data: stub")
"""


def small(*trainers: str) -> list[str]:
    """Options that make their stages short."""
    return [
        option
        for stage in trainers
        for key in ("iterations=3", "warmup_iterations=0")
        for option in ("--set", f"{stage}.{key}")
    ]


SMALL = small("sft", "reward", "rlhf")


class Project:
    """Commands run in its folder by subprocess; ``run`` names the only run, runs/demo."""

    def __init__(self, folder: Path, environment: dict[str, str] | None = None):
        self.folder, self.run = folder, folder / "runs" / "demo"
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("SLURM", "TORCHINDUCTOR", "TRITON"))
        }
        self.environment = {**kept, "PYTHONPATH": str(ROOT), **(environment or {})}
        # as in a checkout: what lies beside it are our packages
        (folder / "launcher").symlink_to(ROOT / "launcher")
        stub = Path(__file__).with_name("stub_stage.py")
        for package in ("training", "training/data", "conversion", "eval"):
            (folder / package).mkdir(parents=True)
            (folder / package / "__init__.py").write_text(PACKAGE)
        for module in (
            "training/sft",
            "training/reward",
            "training/ppo",
            "training/dpo",
            "training/grpo",
            "conversion/hf_to_megatron",
            "conversion/megatron_to_hf",
            "eval/__main__",
        ):
            shutil.copy(stub, folder / f"{module}.py")
        (folder / "training/data/prepare.py").write_text(PREPARE)

    def behave(self, **stages: dict) -> None:
        (self.folder / "behaviour.json").write_text(json.dumps(stages))

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "launcher", *arguments]

    def convoy(self, *arguments: str, timeout: float = 60) -> subprocess.CompletedProcess:
        """Run one command to its end."""
        return subprocess.run(
            self.command(*arguments),
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    def start(self, *arguments: str) -> subprocess.Popen:
        return subprocess.Popen(
            self.command(*arguments),
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def submit(
        self, *arguments: str, target: str = "full-pipeline", profile: str = "local"
    ) -> subprocess.CompletedProcess:
        return self.convoy("submit", target, "--name", "demo", "--profile", profile, *SMALL, *arguments)

    def states(self) -> dict[str, dict]:
        """Stage -> its row of ``status --json``."""
        done = self.convoy("status", "demo", "--json")
        assert done.returncode == 0, done.stderr
        return {row["stage"]: row for row in json.loads(done.stdout)}

    def json(self, name: str) -> dict:
        return json.loads((self.run / name).read_text())

    def ledger(self, event: str) -> list[dict]:
        lines = (self.run / "ledger.jsonl").read_text().splitlines()
        return [row for row in map(json.loads, lines) if row["event"] == event]

    def log(self, stage: str, attempt: int = 1) -> str:
        return (self.run / stage / "logs" / f"attempt_{attempt}.log").read_text()


def wait_until(condition, seconds: float, what: str) -> None:
    """Poll until ``condition()`` is true; the assertion names what did not come."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.05)
