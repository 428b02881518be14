"""A real instruct model against Hugging Face, through its own chat template: ``python
benchmarks/generation/real_model.py STEP ... --model FOLDER [--problems FILE] [--work DIR]``

    convert     FOLDER to a Megatron checkpoint below DIR; conversion.verify compares every tensor
                byte for byte
    logits      of chats with a reply: ours in fp32 and bf16, Hugging Face's in bf16, against
                Hugging Face's in fp64
    greedy      replies to the first 100 problems in fp32, token by token against Hugging Face's
                generate; where they part, how far apart its two best logits are
    solve       all problems, greedy in bf16: share answered rightly in \\boxed{}, tokens per second

FILE holds GSM8K's problems, {"question", "answer"}, as .jsonl.gz. Each step prints a JSON line; a
line with "ok": false is a missed tolerance, and the exit code is 1. ``--small`` takes 4 problems
and 24 tokens, for a try on a CPU.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.common import missed, print_row
from benchmarks.device import free_memory
from benchmarks.training.parity_gpu import settings
from tests.support.attention import relative
from training.checkpoint import format
from training.checkpoint.stage_folder import StageFolder
from training.config.shape import Shape
from training.distributed import groups
from training.generation.engine import EngineLimits
from training.generation.request import Completion, Request, Sampling
from training.generation.rollout_workers import Replicas
from training.models.heads import next_token_logprobs
from training.trainer.step import build_model, evaluate

ROOT = Path(__file__).parents[2]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."
NEW_TOKENS = 400
NEAR = 1e-3
"""Two best logits that are no farther apart may change places by rounding."""


class Case:
    """The model's folder, its tokenizer, the problems, and where the Megatron checkpoint lies."""

    def __init__(self, options: argparse.Namespace):
        self.model, self.work, self.small = options.model, options.work, options.small
        self.tokenizer = AutoTokenizer.from_pretrained(self.model)
        with gzip.open(options.problems, "rt", encoding="utf-8") as file:
            self.problems = [json.loads(line) for line in file]
        self.shape = Shape.read(self.model).with_tokens(len(self.tokenizer))
        self.new_tokens = 24 if self.small else NEW_TOKENS
        self.eos = self.tokenizer.eos_token_id

    def chat(self, problem: dict) -> list[dict]:
        return [{"role": "user", "content": f"{problem['question']}\n{INSTRUCTION}"}]

    def prompts(self, count: int) -> list[list[int]]:
        return [
            self.tokenizer.apply_chat_template(self.chat(problem), add_generation_prompt=True, return_dict=False)
            for problem in self.problems[:count]
        ]

    def hugging_face(self, dtype: torch.dtype) -> torch.nn.Module:
        free_memory()
        return AutoModelForCausalLM.from_pretrained(self.model, dtype=torch.bfloat16).to(DEVICE).to(dtype).eval()

    def ours(self, precision: str) -> torch.nn.Module:
        free_memory()
        model = build_model(self.shape, settings(precision=precision), "lm")
        format.load_weights(StageFolder(self.work / "convert").resolve() / "model", model)
        return model

    def greedy(self, precision: str, prompts: list[list[int]]) -> tuple[list[Completion], Replicas]:
        context = max(map(len, prompts)) + self.new_tokens
        replicas = Replicas(self.ours(precision), self.shape, EngineLimits(context), self.eos)
        sampling = Sampling(self.new_tokens, temperature=0)
        return replicas.generate([Request(prompt, sampling) for prompt in prompts]), replicas


def convert(case: Case) -> None:
    target = case.work / "convert"
    environment = {**os.environ, "MASTER_PORT": "29501"}
    for module, *arguments in (
        ("conversion.hf_to_megatron", case.model, target),
        ("conversion.verify", case.model, target, "--logits", "none"),
    ):
        command = [sys.executable, "-m", module, *map(str, arguments)]
        subprocess.run(command, check=True, cwd=ROOT, env=environment)
    proof = json.loads((case.model / "PROOF.json").read_text())
    print_row(proof["proved"], step="convert", tensors=len(proof["tensors"]))


def logits(case: Case) -> None:
    """Relative L2 error over 8 chats of question and solution, padded to one length."""
    chats = [[*case.chat(one), {"role": "assistant", "content": one["answer"]}] for one in case.problems[:8]]
    rows = [case.tokenizer.apply_chat_template(chat, return_dict=False) for chat in chats[: 2 if case.small else 8]]
    length = -(-max(map(len, rows)) // 128) * 128
    tokens = torch.full((len(rows), length), case.eos)
    for row, ids in zip(tokens, rows, strict=True):
        row[: len(ids)] = torch.tensor(ids)
    inside = torch.arange(length) < torch.tensor([len(ids) for ids in rows])[:, None]

    def theirs(dtype: torch.dtype) -> torch.Tensor:
        model = case.hugging_face(dtype)
        with torch.no_grad():
            parts = [model(input_ids=row[None].to(DEVICE)).logits[0, :, : case.shape.tokens].cpu() for row in tokens]
        return torch.stack(parts)[inside]

    def ours(precision: str) -> torch.Tensor:
        model, parts = case.ours(precision), []

        def read(output, micro):
            parts.append(output.logits()[..., : case.shape.tokens].float().cpu())
            return next_token_logprobs(output, micro["tokens"])

        evaluate(model, {"tokens": tokens}, 2, read)
        return torch.cat(parts)[: len(rows)][inside]

    exact, rounded, single, half = theirs(torch.float64), theirs(torch.bfloat16), ours("fp32"), ours("bf16")
    fp32, bf16, peer = (relative(values, exact) for values in (single, half, rounded))
    same = (half.argmax(-1) == exact.argmax(-1)).float().mean().item()
    print_row(fp32 <= 2e-5 and bf16 <= 1.1 * peer, step="logits", fp32=fp32, bf16=bf16, hf_bf16=peer, same_argmax=same)


def greedy(case: Case) -> None:
    prompts = case.prompts(4 if case.small else 100)
    completions, _ = case.greedy("fp32", prompts)
    model, parted = case.hugging_face(torch.float32), []
    for number, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        # Hugging Face's greedy choice at every step, given our reply so far
        ids = torch.tensor([prompt + completion.tokens], device=DEVICE)
        with torch.no_grad():
            steps = model(input_ids=ids).logits[0, len(prompt) - 1 : -1, : case.shape.tokens]
        chosen = steps.argmax(-1).tolist()
        if chosen != completion.tokens:
            at = next(at for at, (a, b) in enumerate(zip(chosen, completion.tokens, strict=True)) if a != b)
            best = steps[at].topk(2).values
            parted.append({"problem": number, "token": at, "gap": (best[0] - best[1]).item()})
    check_generate(case, model, prompts[:8], completions[:8])
    far = [one for one in parted if one["gap"] > NEAR]
    total = sum(len(one.tokens) for one in completions)
    print_row(not far, step="greedy", same=len(prompts) - len(parted), of=len(prompts), tokens=total, parted=parted)


def check_generate(case: Case, model, prompts: list[list[int]], completions: list[Completion]) -> None:
    """The same by Hugging Face's generate itself, with its cache, one prompt at a time."""
    same = 0
    for prompt, completion in zip(prompts, completions, strict=True):
        ids = torch.tensor([prompt], device=DEVICE)
        options = {"do_sample": False, "max_new_tokens": case.new_tokens, "eos_token_id": case.eos}
        options |= {"temperature": None, "top_p": None, "top_k": None, "repetition_penalty": None}
        with torch.no_grad():
            reply = model.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=case.eos, **options)
        same += reply[0, len(prompt) :].tolist() == completion.tokens
    print_row(same == len(prompts), step="generate", same=same, of=len(prompts))


def solve(case: Case) -> None:
    prompts = case.prompts(4 if case.small else len(case.problems))
    began = time.monotonic()
    completions, replicas = case.greedy("bf16" if DEVICE == "cuda" else "fp32", prompts)
    right = boxed = 0
    for problem, completion in zip(case.problems, completions, strict=False):
        answers = re.findall(r"\\boxed\{([^{}]*)\}", case.tokenizer.decode(completion.tokens))
        boxed += bool(answers)
        expected = problem["answer"].rpartition("####")[2].strip().replace(",", "")
        right += bool(answers) and re.sub(r"[^0-9.\-]", "", answers[-1]).rstrip(".") == expected
    tokens, count = sum(len(one.tokens) for one in completions), len(prompts)
    print_row(
        step="solve",
        problems=count,
        right=right / count,
        boxed=boxed / count,
        ended=sum(one.reason == "eos" for one in completions) / count,
        tokens_each=tokens / count,
        seconds=time.monotonic() - began,
        report=str(replicas.report),
    )


STEPS = {"convert": convert, "logits": logits, "greedy": greedy, "solve": solve}


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("steps", nargs="+", choices=STEPS)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--problems", type=Path, default=ROOT.parent / "shared" / "data" / "gsm8k" / "test.jsonl.gz")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "convoy-real-model")
    parser.add_argument("--small", action="store_true")
    case = Case(parser.parse_args(arguments))
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="29500")
    print_row(torch=torch.__version__, device=torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu")
    with groups.ranks(1, 1, seed=1):
        for step in parser.parse_args(arguments).steps:
            STEPS[step](case)
            free_memory()
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
