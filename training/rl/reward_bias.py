"""The reward model's bias: with it the SFT policy's own responses score 0 on average (Stiennon et
al. 2020, section 3.4).

A ranking loss leaves the scores' zero open, and PPO starts from the SFT policy. That policy answers
some training prompts once, before the reward model is built, so that no GPU holds both; each
checkpoint of the reward model scores the answers and holds its own bias.
"""

from __future__ import annotations

import dataclasses
import gc
import hashlib
import json
from collections.abc import Collection
from functools import partial
from pathlib import Path

import torch

from training.checkpoint import checksums, format
from training.checkpoint.stage_folder import StageFolder
from training.config.trainers import RewardConfig
from training.data.batches import Example, Sampler, collate, padded_length, prompt_tokens
from training.distributed import groups
from training.errors import ConfigError
from training.files import atomic
from training.generation.request import draws
from training.generation.rollout_workers import Replicas
from training.trainer.sample_text import limits, replies
from training.trainer.setup import Inputs, length_multiple, packed
from training.trainer.step import Learner, build_model, evaluate

RESPONSES = "sft_responses.json"
"""In the stage's folder: {"made_from": ..., "responses": [[ids, index of the response's first id],
...]}; an attempt that goes on reads what the first one sampled."""


def answer(config: RewardConfig, inputs: Inputs) -> None:
    """Let the SFT policy respond, at temperature 1, to ``calibration_samples`` training prompts,
    unless that is done. A collective."""
    if not config.calibration_samples or groups.on_first(partial(_read, config)) is not None:
        return
    steps = min(config.calibration_length, config.seq_length // 2)
    count = min(config.calibration_samples, len(inputs.rows))
    indices = Sampler(len(inputs.rows), count, config.seed).next_batch()
    prompts = [prompt_tokens(inputs.rows[index], config.seq_length - steps) for index in indices]
    model = build_model(inputs.shape, dataclasses.replace(config, lora_rank=0), "lm")
    format.load_weights(StageFolder(config.paths.init).resolve() / "model", model)
    replicas = Replicas(
        model, inputs.shape.with_tokens(inputs.tokenizer.ids), limits(config.seq_length), inputs.rows.stop_ids
    )
    responses = replies(replicas, prompts, steps, draws(config.seed, 0, count, steps))
    sampled = [Example(prompt + response, len(prompt)) for prompt, response in zip(prompts, responses, strict=True)]
    if groups.is_main():
        path = Path(config.paths.output) / RESPONSES
        path.parent.mkdir(parents=True, exist_ok=True)
        stored = [(response.tokens, response.response_start) for response in sampled]
        atomic.write_text(path, json.dumps({"made_from": _made_from(config), "responses": stored}) + "\n")
    del model, replicas
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def read(config: RewardConfig) -> list[Example]:
    """What ``answer`` wrote; none where no calibration is asked for."""
    if not config.calibration_samples:
        return []
    return [Example(tokens, start) for tokens, start in groups.on_first(partial(_read, config))]


def _read(config: RewardConfig) -> list | None:
    """The file's responses, if they are what ``answer`` would make now."""
    path = Path(config.paths.output) / RESPONSES
    stored = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"made_from": ""}
    return stored["responses"] if stored["made_from"] == _made_from(config) else None


def _made_from(config: RewardConfig) -> str:
    """The SFT checkpoint's bytes, the rows' and the tokenizer's, and what chooses and cuts prompts
    and responses."""
    rows = [checksums.digest(path) for path in (config.paths.train, Path(config.paths.model, "tokenizer.json"))]
    listed = sorted(checksums.read(StageFolder(config.paths.init).resolve()).items())
    described = repr(
        (listed, rows, config.seed, config.seq_length, config.calibration_samples, config.calibration_length)
    )
    return hashlib.sha256(described.encode()).hexdigest()


def bias(
    config: RewardConfig, learner: Learner, responses: list[Example], stop_ids: Collection[int], pad_id: int
) -> float:
    """Minus the mean score of the responses that ended (PPO gives the others a penalty instead), of
    all where none did; 0 without responses. A collective."""
    if not responses:
        return 0.0
    ended = [response for response in responses if response.tokens[-1] in stop_ids] or responses
    local = ended[groups.data_rank() :: groups.data_ranks()]
    sums = torch.zeros(2, dtype=torch.double)
    if local:
        sums = torch.stack(
            (rewards(config, learner, local, pad_id).double().sum(), torch.tensor(float(len(local))).double())
        )
    total, count = groups.sum_over_data(sums.to(groups.device())).tolist()
    return -total / count


def rewards(config: RewardConfig, learner: Learner, examples: list[Example], pad_id: int) -> torch.Tensor:
    """(examples,) fp32 on the CPU: what the head says at each example's last token."""
    if config.packing:
        batch, ends = packed(config, examples, pad_id)
    else:
        batch = collate(
            examples, pad_id, padded_length([len(example.tokens) for example in examples], length_multiple(config))
        )
        ends = torch.arange(len(examples)) * batch["tokens"].size(1) + batch["lengths"] - 1
    return evaluate(learner.wrapped, batch, config.micro_batch_size, lambda values, micro: values).cpu().flatten()[ends]


def stored(reward_checkpoint: Path) -> float:
    """The bias that a reward model's checkpoint (".../iter_0000100") holds. Raises ConfigError for
    one made before there was one."""
    path = reward_checkpoint / "state.json"
    state = json.loads(path.read_text(encoding="utf-8"))
    if "reward_bias" not in state:
        raise ConfigError(
            f"{path} holds no reward_bias: it was made by an earlier version; train the reward model again "
            "(python -m launcher resume RUN --from reward)"
        )
    return state["reward_bias"]
