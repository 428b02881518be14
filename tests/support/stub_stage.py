"""A stage program for tests of the launcher, standard library only: it keeps a stage's contract
(checkpoints, latest, metrics.jsonl, exit codes, signals) and misbehaves as ``behaviour.json`` in
the working directory says:

  fail_at N      raise at iteration N on rank ``rank`` (default 0), until the file ``mended``
                 exists;
                 with ``fail_in NAME`` only in the run of this name
  exit N         end with this exit code at the start
  pause_at N     save and exit 75 on reaching iteration N
  stuck true     exit 75 without having saved anything
  step_s S       seconds an iteration takes
  omit true      exit 0 without writing what the stage is for
  signal_at N    end by signal ``signal`` (default 9) at iteration N on rank ``rank``, once;
                 ``exit_at N``: by os._exit(``code``, default 0)
  hang_at N      rank ``rank`` answers no more from iteration N on, once; the others end with gloo's
                 message after ``timeout_s`` (default 2)
  deaf true      TERM, USR1 and USR2 are not heeded
  big_at N       the checkpoint of this iteration is larger than a limit of 100 kB a file, until the
                 file ``mended`` exists
  save_every N   iterations between checkpoints (default 1)
  late_s S       rank 0 takes so much longer than the others, at its end
  lines N        lines that each rank prints in an iteration
  fill_at N      fill the disk at this iteration
  say NAME       print the value of this environment variable
  items N        files that a stage without iterations makes, each in step_s seconds; a later
                 attempt makes the rest
  words [C, M]   leave class C and message M as last words and end with exit code 1

Iterations that a checkpoint holds are noted in ``executed.jsonl`` of the working directory, outside
the run, so that a test can tell whether one was lost or run twice. Rank 0 listens on MASTER_PORT as
a real one does.
"""

import hashlib
import json
import os
import resource
import signal
import socket
import sys
import time
from pathlib import Path

TRAINERS = {"sft": ["model"], "reward": ["model"], "rlhf": ["policy", "value"], "dpo": ["model"], "grpo": ["policy"]}
told = []


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.name}.{os.getpid()}")
    aside.write_text(text)
    os.replace(aside, path)


def save(output: Path, iteration: int, models: list[str], padding: int = 0) -> None:
    folder, text = output / "checkpoints" / f"iter_{iteration:07d}", f"{output.name} {iteration}{' ' * padding}"
    newest = output / ".attempt"
    if newest.exists() and newest.read_text().strip() != os.environ["CONVOY_ATTEMPT"]:
        # as training.checkpoint.stage_folder
        raise OSError(f"attempt {newest.read_text().strip()} has begun")
    for model in models:
        write(folder / model / "weights", text)
    digest = hashlib.sha256(text.encode()).hexdigest()
    write(folder / "SHA256", "".join(f"{digest}  {model}/weights\n" for model in models))
    write(output / "latest", f"{iteration}\n")


def note(output: Path, iterations: list[int]) -> None:
    with open("executed.jsonl", "a") as file:
        file.write(
            "".join(
                json.dumps({"run": output.parent.name, "stage": output.name, "iteration": number, "pid": os.getpid()})
                + "\n"
                for number in iterations
            )
        )


def pause(rank: int) -> None:
    for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # as training.distributed.groups.ignore_requests
    time.sleep(0.5 * (rank > 0))  # a real trainer's ranks leave together
    sys.exit(75)


def first_time(output: Path, what: str) -> bool:
    """Whether this misdeed has not been done yet: a later attempt of the stage is spared it."""
    try:
        Path(f"{output.parent.name}.{output.name}.{what}").touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def misbehave(output: Path, behaviour: dict, iteration: int, rank: int) -> None:
    """What is to go wrong at this iteration on this rank."""
    mine = behaviour.get("rank", 0) == rank
    here = behaviour.get("fail_in", output.parent.name) == output.parent.name
    if behaviour.get("fail_at") == iteration and mine and here and not Path("mended").exists():
        raise RuntimeError(f"loss is nan at iteration {iteration}")
    if behaviour.get("signal_at") == iteration and mine and first_time(output, "signal"):
        os.kill(os.getpid(), behaviour.get("signal", signal.SIGKILL))
    if behaviour.get("exit_at") == iteration and mine and first_time(output, "exit"):
        os._exit(behaviour.get("code", 0))
    if behaviour.get("hang_at") == iteration and (mine and first_time(output, "hang") or not mine):
        hang(output, behaviour, mine)


def hang(output: Path, behaviour: dict, mine: bool) -> None:
    marker = Path(f"{output.parent.name}.{output.name}.hung")
    if mine:
        for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        marker.touch()
        time.sleep(3600)
    time.sleep(0.3)
    if marker.exists():
        marker.unlink()
        seconds = behaviour.get("timeout_s", 2)
        time.sleep(seconds)
        raise RuntimeError(
            f"[/pytorch/third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting {seconds * 1000}ms "
            "for recv operation to complete"
        )


def fill(output: Path) -> None:
    """Until not a byte is free; raises OSError."""
    with open(output / "fill", "wb", buffering=0) as file:
        while True:
            file.write(b"." * 4096)


def train(output: Path, total: int, rank: int, behaviour: dict) -> None:
    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN if behaviour.get("deaf") else lambda number, _frame: told.append(number))
    start = int((output / "latest").read_text()) if (output / "latest").exists() else 0
    if behaviour.get("stuck"):
        pause(rank)
    unsaved = []
    for iteration in range(start + 1, total + 1):
        time.sleep(behaviour.get("step_s", 0))
        misbehave(output, behaviour, iteration, rank)
        if behaviour.get("fill_at") == iteration:
            fill(output)
        unsaved.append(iteration)
        for number in range(behaviour.get("lines", 0)):
            print(f"iteration {iteration} line {number}")
        sys.stdout.flush()
        stop = {signal.SIGUSR1, signal.SIGTERM} & set(told) or behaviour.get("pause_at") == iteration
        asked = signal.SIGUSR2 in told
        told[:] = [number for number in told if number != signal.SIGUSR2]
        if rank == 0:
            with open(output / "metrics.jsonl", "a") as file:
                file.write(
                    json.dumps({"iteration": iteration, "total": total, "time": time.time(), "loss": 1 / iteration})
                    + "\n"
                )
            if stop or asked or iteration == total or iteration % behaviour.get("save_every", 1) == 0:
                big = behaviour.get("big_at") == iteration and not Path("mended").exists()
                if big:
                    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
                save(output, iteration, TRAINERS[output.name], 200_000 * big)
                note(output, unsaved)
                unsaved = []
        if stop:
            pause(rank)


def work(output: Path, behaviour: dict) -> None:
    """A stage without iterations: it ends on USR1 and TERM with what it has made."""
    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, lambda *_: pause(0))
    for item in range(behaviour.get("items", 1)):
        path = output / "made" / f"{item}"
        if not path.exists():
            time.sleep(behaviour.get("step_s", 0))
            write(path, f"item {item}")


def last_words(rank: int, kind: str, message: str) -> None:
    write(Path(os.environ["CONVOY_WORDS"]) / f"rank_{rank}.json", json.dumps({"class": kind, "message": message}))
    sys.exit(1)


def main() -> None:
    config = json.loads(Path(sys.argv[1]).read_text())
    output = Path(config["paths"]["output"])
    behaviours = json.loads(Path("behaviour.json").read_text()) if Path("behaviour.json").exists() else {}
    behaviour, rank = behaviours.get(output.name, {}), int(os.environ["RANK"])
    names = (
        "RANK",
        "WORLD_SIZE",
        "LOCAL_RANK",
        "MASTER_ADDR",
        "MASTER_PORT",
        "CUDA_VISIBLE_DEVICES",
        "SLURMD_NODENAME",
        "SLURM_CPUS_PER_TASK",
        "TORCHINDUCTOR_CACHE_DIR",
        "TRITON_CACHE_DIR",
    )
    write(
        output / f"rank_{rank}.json", json.dumps({"pid": os.getpid(), **{name: os.environ.get(name) for name in names}})
    )
    print(f"{output.name} rank {rank} of {os.environ['WORLD_SIZE']}")
    if "say" in behaviour:
        print(f"{behaviour['say']} is {os.environ.get(behaviour['say'])}")
    if rank == 0:
        listener = socket.create_server(("", int(os.environ["MASTER_PORT"])))  # noqa: F841 - held until the end
    socket.getaddrinfo(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    if "words" in behaviour:
        last_words(rank, *behaviour["words"])
    if "exit" in behaviour:
        print("error: told to end", file=sys.stderr)
        sys.exit(behaviour["exit"])
    if behaviour.get("omit"):
        return
    if output.name in TRAINERS:
        train(output, config["iterations"], rank, behaviour)
        time.sleep(behaviour.get("late_s", 0) if rank == 0 else 0)
        return
    work(output, behaviour)
    if output.name == "convert":
        save(output, 0, ["model"])
    elif output.name == "export":
        for model in config["paths"]["checkpoints"]:
            write(output / model / "config.json", "{}")
            write(output / model / "model.safetensors", model)
    else:
        for name in ("results.json", "table.md", "table.csv", "model_answer/sft.jsonl"):
            write(output / name, name)
        write(Path(config["paths"]["report"]), "<html>")
    if rank == 0:
        note(output, [0])


if __name__ == "__main__":
    main()
