"""A stage program for tests of the launcher, standard library only: it keeps a stage's contract (checkpoints, latest, metrics.jsonl, exit
codes, signals) and misbehaves as ``behaviour.json`` in the working directory says:

  fail_at N      raise at iteration N on rank ``rank`` (default 0), until the file ``mended`` exists
  exit N         end with this exit code at the start
  pause_at N     save and exit 75 on reaching iteration N
  stuck true     exit 75 without having saved anything
  step_s S       seconds an iteration takes
  omit true      exit 0 without writing what the stage is for
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

TRAINERS = {"sft": ["model"], "reward": ["model"], "rlhf": ["policy", "value"]}
told = []


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.name}.{os.getpid()}")
    aside.write_text(text)
    os.replace(aside, path)


def save(output: Path, iteration: int, models: list[str]) -> None:
    for model in models:
        write(output / "checkpoints" / f"iter_{iteration:07d}" / model / "weights", f"{output.name} {iteration}")
    write(output / "latest", f"{iteration}\n")


def pause(rank: int) -> None:
    time.sleep(0.5 * (rank > 0))  # a real trainer's ranks leave together
    sys.exit(75)


def train(output: Path, total: int, rank: int, behaviour: dict) -> None:
    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, lambda number, _frame: told.append(number))
    start = int((output / "latest").read_text()) if (output / "latest").exists() else 0
    if behaviour.get("stuck"):
        pause(rank)
    for iteration in range(start + 1, total + 1):
        time.sleep(behaviour.get("step_s", 0))
        if behaviour.get("fail_at") == iteration and behaviour.get("rank", 0) == rank and not Path("mended").exists():
            raise RuntimeError(f"loss is nan at iteration {iteration}")
        stop = told or behaviour.get("pause_at") == iteration
        if rank == 0:
            with open(output / "metrics.jsonl", "a") as file:
                file.write(json.dumps({"iteration": iteration, "total": total, "time": time.time(), "loss": 1 / iteration}) + "\n")
            save(output, iteration, TRAINERS[output.name])
        if stop:
            pause(rank)


def main() -> None:
    config = json.loads(Path(sys.argv[1]).read_text())
    output = Path(config["paths"]["output"])
    behaviours = json.loads(Path("behaviour.json").read_text()) if Path("behaviour.json").exists() else {}
    behaviour, rank = behaviours.get(output.name, {}), int(os.environ["RANK"])
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "CUDA_VISIBLE_DEVICES", "SLURMD_NODENAME",
             "SLURM_CPUS_PER_TASK")
    write(output / f"rank_{rank}.json", json.dumps({"pid": os.getpid(), **{name: os.environ.get(name) for name in names}}))
    print(f"{output.name} rank {rank} of {os.environ['WORLD_SIZE']}")
    if "exit" in behaviour:
        print("error: told to end", file=sys.stderr)
        sys.exit(behaviour["exit"])
    if behaviour.get("omit"):
        return
    if output.name in TRAINERS:
        train(output, config["iterations"], rank, behaviour)
    elif output.name == "convert":
        time.sleep(behaviour.get("step_s", 0))
        save(output, 0, ["model"])
    elif output.name == "export":
        for model in ("sft", "rlhf"):
            write(output / model / "config.json", "{}")
            write(output / model / "model.safetensors", model)
    else:
        for name in ("results.json", "table.md", "table.csv", "model_answer/sft.jsonl"):
            write(output / name, name)
        write(Path(config["paths"]["report"]), "<html>")


if __name__ == "__main__":
    main()
