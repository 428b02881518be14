"""``python -m training.distributed.gpu_check``: is this GPU fit, and do all of them reach each
other? One process a GPU, before a stage starts.

Reads RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, NODE, MASTER_ADDR, MASTER_PORT. Prints one
JSON line for each check that it gets to: {"node", "gpu", "check", "bad"}, with ``bad`` "" when all
is well: "gpu" (memory is free, a matrix product is exact; with "tflops"), "node" (a sum over the
node's GPUs), "all" (a sum over all). A process that hangs says nothing: its caller has a timeout.
"""

from __future__ import annotations

import json
import os
import sys
import time
from datetime import timedelta

import torch
import torch.distributed as dist

SIZE = 4096
"""Rows and columns of the matrices."""
PRODUCTS = 20
"""Matrix products that are timed."""
TIMEOUT_S = 60
USED_SHARE = 0.05
"""Share of a GPU's memory that may be in use before we are on it (driver, MPS); above it somebody
else computes there."""
ELEMENTS = 1 << 24
"""Numbers in the sums: 64 MB, enough for every link to carry some."""


def check_gpu(local_rank: int) -> tuple[str, float]:
    """What is wrong with this GPU ("" = nothing), and its speed in TFLOP/s.

    The product of matrices of small whole numbers is exact in bfloat16 with fp32 sums, so A(Bx) =
    (AB)x must hold to the last bit (Freivalds 1977).
    """
    if local_rank >= torch.cuda.device_count():
        return f"only {torch.cuda.device_count()} GPU(s) are visible", 0.0
    torch.cuda.set_device(local_rank)
    free, total = torch.cuda.mem_get_info()
    if total - free > USED_SHARE * total:
        return f"it is not empty: {(total - free) / 2**30:.1f} of {total / 2**30:.0f} GiB in use", 0.0
    generator = torch.Generator("cuda").manual_seed(local_rank)
    left, right = (torch.randint(-3, 4, (SIZE, SIZE), device="cuda", generator=generator) for _ in range(2))
    vector = torch.randint(-3, 4, (SIZE, 1), device="cuda", generator=generator).double()
    a, b = left.bfloat16(), right.bfloat16()
    product = torch.mm(a, b, out_dtype=torch.float32)
    if not torch.equal(product.double() @ vector, left.double() @ (right.double() @ vector)):
        return "its matrix product is wrong", 0.0
    torch.mm(a, b)  # chooses its kernel
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(PRODUCTS):
        torch.mm(a, b)
    torch.cuda.synchronize()
    return "", 2 * SIZE**3 * PRODUCTS / (time.perf_counter() - began) / 1e12


def check_sum(rank: int, world: int, address: str, port: int) -> str:
    """ "" when an all-reduce over ``world`` processes gives the right sum within TIMEOUT_S."""
    device = torch.device("cuda", torch.cuda.current_device())
    try:
        dist.init_process_group(
            "nccl",
            init_method=f"tcp://{address}:{port}",
            rank=rank,
            world_size=world,
            device_id=device,
            timeout=timedelta(seconds=TIMEOUT_S),
        )
        values = torch.full((ELEMENTS,), float(rank + 1), device=device)
        work = dist.all_reduce(values, async_op=True)
        if not work.wait(timedelta(seconds=TIMEOUT_S)):
            return f"no sum within {TIMEOUT_S} s"
        torch.cuda.synchronize()
        expected = world * (world + 1) / 2
        wrong = int((values != expected).sum())
        return f"{wrong} of {ELEMENTS} sums are wrong" if wrong else ""
    except (RuntimeError, ValueError) as error:
        return str(error).splitlines()[0]
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def main() -> int:
    """0 when all is well; the lines say what isn't."""
    rank, world, local = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    here, port = int(os.environ["LOCAL_WORLD_SIZE"]), int(os.environ["MASTER_PORT"])

    def say(check: str, bad: str, **values) -> bool:
        print(json.dumps({"node": os.environ["NODE"], "gpu": local, "check": check, "bad": bad, **values}), flush=True)
        return not bad

    bad, tflops = check_gpu(local)
    if not say("gpu", bad, tflops=tflops):
        return 1
    if not say("node", check_sum(local, here, "127.0.0.1", port + 1)):
        return 1
    return 0 if say("all", check_sum(rank, world, os.environ["MASTER_ADDR"], port)) else 1


if __name__ == "__main__":
    if {"-h", "--help"} & set(sys.argv[1:]):
        sys.exit(print(__doc__))
    sys.exit(main())
