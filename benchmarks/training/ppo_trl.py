"""The peer of ppo.py: TRL's PPO trainer on Hugging Face's BLOOM, the same prompts and lengths.

The settings favour TRL:

- weights, gradients and both moments in bf16 (8 bytes a parameter), without autocast, which would
  make fp32 logits;
- fused AdamW, gradient checkpointing (its default), one optimizer over policy and value model;
- as many rows at once as its logits allow. It keeps a row of fp32 logits, the whole vocabulary, for
  every sampled token of a batch, and twice for a while (513 MB a sample of 512 tokens at 250,880
  columns each time).

BLOOM has eager attention only. TRL makes one optimizer step a batch for any num_mini_batches,
because it accumulates gradients over the whole batch.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.common import print_row
from benchmarks.device import CUDA, DEVICE, peak_gb
from training.config.shape import Shape

METRICS = (
    "objective/kl",
    "objective/scores",
    "policy/approxkl_avg",
    "val/ratio",
    "loss/policy_avg",
    "loss/value_avg",
    "policy/entropy_avg",
)


def run(options: argparse.Namespace, shape: Shape) -> None:
    """Iterations of TRL's trainer; a row for each."""
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    from transformers import PreTrainedTokenizerFast, TrainerCallback
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    from benchmarks.training.ppo import write_inputs

    class Clock(TrainerCallback):
        def __init__(self):
            self.began = time.monotonic()

        def on_log(self, args, state, control, logs=None, **_):
            now = time.monotonic()
            row = {
                "model": options.model,
                "iteration": state.global_step,
                "seconds": round(now - self.began, 2),
                "samples_per_second": round(options.samples / (now - self.began), 3),
                "peak_gb": round(peak_gb(), 1),
            }
            print_row(part="trl", **row, **{name: logs[name] for name in METRICS})
            self.began = time.monotonic()

    with tempfile.TemporaryDirectory() as name:
        write_inputs(shape, Path(name), options.samples * options.iterations, options.length)
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_file=f"{name}/tokenizer.json", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
        )
        prompts = [json.loads(line)["prompt"] for line in (Path(name) / "rlhf.jsonl").read_text().splitlines()]
        rows = [{"input_ids": tokenizer.encode(prompt)[-options.length :]} for prompt in prompts]
        policy, reference, value, reward = models(shape)
        config = PPOConfig(
            output_dir=f"{name}/out",
            per_device_train_batch_size=options.rows,
            gradient_accumulation_steps=options.samples // options.rows,
            num_mini_batches=options.samples // options.minibatch,
            num_ppo_epochs=1,
            total_episodes=options.samples * options.iterations,
            response_length=options.length,
            local_rollout_forward_batch_size=min(options.samples, 64),
            num_sample_generations=0,
            temperature=1.0,
            learning_rate=2.4e-7,
            bf16=False,
            gradient_checkpointing=True,
            report_to=[],
            save_strategy="no",
            logging_steps=1,
            use_cpu=not CUDA,
            disable_tqdm=True,
            optim="adamw_torch_fused" if CUDA else "adamw_torch",
        )
        trainer = PPOTrainer(
            config, tokenizer, policy, reference, reward, rows, value, eval_dataset=rows[:1], callbacks=[Clock()]
        )
        trainer.train()


def models(shape: Shape) -> list:
    """Policy, reference, value and reward model with random weights, on the device."""
    from transformers import BloomConfig, BloomForCausalLM, BloomForSequenceClassification

    config = BloomConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        n_layer=shape.layers,
        n_head=shape.heads,
        num_labels=1,
        pad_token_id=3,
        eos_token_id=None,
    )
    torch.set_default_dtype(torch.bfloat16 if CUDA else torch.float32)
    all_models = []
    with torch.device(DEVICE):
        for kind in (
            BloomForCausalLM,
            BloomForCausalLM,
            BloomForSequenceClassification,
            BloomForSequenceClassification,
        ):
            torch.manual_seed(1)
            all_models.append(kind._from_config(config, attn_implementation="eager"))
    torch.set_default_dtype(torch.float32)
    for model in (all_models[0], all_models[2]):
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return all_models
