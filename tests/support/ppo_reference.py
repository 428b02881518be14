"""PPO once more, in plain torch on Hugging Face's models, one process, one row at a time: what
test_ppo_reference.py compares with.

Nothing of training.ppo, training.rl.experience, training.losses or megatron-core is used; the
prompts' order is the trainer's. Advantages are the written-out sum of Schulman et al. 2016, eq. 16,
not a recursion; a row is never padded; generation has no cache.
"""

from __future__ import annotations

import copy
import json

import numpy as np
import tokenizers
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedConfig

from training.checkpoint.stage_folder import StageFolder
from training.config.trainers import PPOConfig
from training.data.batches import Sampler
from training.data.permutation import Permutation


class Scalar(torch.nn.Module):
    """Hugging Face's model with one number a token; a Llama's head has no bias."""

    def __init__(self, config: PreTrainedConfig, body: dict, *head: torch.Tensor):
        super().__init__()
        self.body, self.head = (
            AutoModel.from_config(config),
            torch.nn.Linear(config.hidden_size, 1, bias=len(head) == 2),
        )
        self.body.load_state_dict(body)
        self.head.load_state_dict(dict(zip(("weight", "bias"), head, strict=False)))

    def forward(self, tokens: list[int]) -> torch.Tensor:
        return self.head(self.body(torch.tensor([tokens])).last_hidden_state[0])[:, 0]


class Row:
    """One prompt with its response, and what the four models said of it before the update; (R,)
    tensors over response tokens."""

    def __init__(self, tokens: list[int], start: int, ended: bool):
        self.tokens, self.start, self.ended = tokens, start, ended
        self.logprobs = self.reference = self.values = self.rewards = self.advantages = self.returns = torch.empty(0)
        self.score = 0.0


class Reference:
    """The iteration of training/ppo.py; ``sft`` and ``reward``: Hugging Face's names -> weights,
    ``head``: weight and bias."""

    def __init__(self, config: PPOConfig, sft: dict, reward: dict, head: tuple):
        self.config = config
        shape = AutoConfig.from_pretrained(config.paths.model)
        self.policy = AutoModelForCausalLM.from_config(shape).eval()
        self.policy.base_model.load_state_dict(sft)
        self.policy.tie_weights()
        self.frozen = copy.deepcopy(self.policy)
        self.critic, self.judge = Scalar(shape, reward, *head).eval(), Scalar(shape, reward, *head).eval()
        tokenizer = tokenizers.Tokenizer.from_file(f"{config.paths.model}/tokenizer.json")
        with open(f"{config.paths.model}/special_tokens_map.json") as file:
            eos = json.load(file)["eos_token"]
        self.eos = tokenizer.token_to_id(eos if isinstance(eos, str) else eos["content"])
        with open(config.paths.train) as file:
            self.prompts = [tokenizer.encode(json.loads(line)["prompt"]).ids[-config.prompt_length :] for line in file]
        self.sampler = Sampler(len(self.prompts), config.rollout_batch_size // config.group_size, config.seed)
        with open(StageFolder(config.paths.reward).resolve() / "state.json") as file:
            self.bias = json.load(file)["reward_bias"]
        self.value_bias = None  # the head's zero is measured in the first iteration
        self.steps = 0
        self.optimizers = {
            name: self.adam(model, lr)
            for name, model, lr in (
                ("policy", self.policy, config.lr),
                ("value", self.critic, getattr(config, "value_lr", 0.0)),
            )
        }

    def adam(self, model: torch.nn.Module, lr: float) -> torch.optim.AdamW:
        groups = [[p for p in model.parameters() if (p.dim() > 1) == matrix] for matrix in (True, False)]
        decay = self.config.weight_decay
        return torch.optim.AdamW(
            [{"params": groups[0], "weight_decay": decay}, {"params": groups[1], "weight_decay": 0.0}],
            lr=lr,
            betas=(self.config.adam_beta1, self.config.adam_beta2),
            eps=self.config.adam_eps,
        )

    def logits(self, model, row: Row) -> torch.Tensor:
        """(R, V): at each response token, the distribution it was drawn from."""
        return model(torch.tensor([row.tokens])).logits[0, row.start - 1 : -1] / self.config.temperature

    def logprobs(self, model, row: Row) -> torch.Tensor:
        chosen = torch.tensor(row.tokens[row.start :])
        return self.logits(model, row).log_softmax(-1)[torch.arange(len(chosen)), chosen]

    def values(self, row: Row) -> torch.Tensor:
        return self.critic(row.tokens)[row.start - 1 : -1] + self.value_bias

    @torch.no_grad()
    def sample(self, prompt: list[int], uniforms: list[float]) -> Row:
        tokens = list(prompt)
        for uniform in uniforms:
            odds = (self.policy(torch.tensor([tokens])).logits[0, -1] / self.config.temperature).softmax(-1).cumsum(-1)
            tokens.append(int((odds <= uniform * odds[-1]).sum()))
            if tokens[-1] == self.eos:
                break
        return Row(tokens, len(prompt), tokens[-1] == self.eos)

    @torch.no_grad()
    def scored(self, rows: list[Row]) -> dict[str, float]:
        """What the models say of the rows, and the means that are reported of it."""
        config = self.config
        for row in rows:
            row.logprobs, row.reference = self.logprobs(self.policy, row), self.logprobs(self.frozen, row)
            row.score = self.judge(row.tokens)[-1].item()
        for row in rows:
            row.score = max(-config.reward_clip, min(config.reward_clip, row.score + self.bias))
            row.score = row.score if row.ended else config.missing_eos_penalty
        return {
            "reward": sum(row.score for row in rows) / len(rows),
            "eos_rate": sum(row.ended for row in rows) / len(rows),
            "kl": sum((row.logprobs - row.reference).sum().item() for row in rows) / len(rows),
            "response_length": sum(len(row.logprobs) for row in rows) / len(rows),
        }

    @torch.no_grad()
    def judged(self, rows: list[Row]) -> dict[str, float]:
        """Fill the rows in; the means that are reported of them."""
        config, means = self.config, self.scored(rows)
        for row in rows:
            row.rewards = -config.kl_coef * (row.logprobs - row.reference)
            row.rewards[-1] += row.score
        if self.value_bias is None:
            self.value_bias = 0.0
            to_come = [
                sum(config.gamma ** (k - t) * row.rewards[k] for k in range(t, len(row.rewards)))
                for row in rows
                for t in range(len(row.rewards))
            ]
            self.value_bias = (torch.stack(to_come) - torch.cat([self.values(row) for row in rows])).mean().item()
        for row in rows:
            row.values = self.values(row)
            rewards = row.rewards
            after = torch.cat((row.values[1:], torch.zeros(1)))
            delta = rewards + config.gamma * after - row.values
            row.advantages = torch.stack(
                [
                    sum((config.gamma * config.lam) ** (k - t) * delta[k] for k in range(t, len(delta)))
                    for t in range(len(delta))
                ]
            )
            row.returns = row.advantages + row.values
        every = torch.cat([row.advantages for row in rows]).double()
        for row in rows:
            row.advantages = ((row.advantages - every.mean()) / (every.var(correction=0) + 1e-8).sqrt()).float()
        returns, values = torch.cat([row.returns for row in rows]), torch.cat([row.values for row in rows])
        return {
            **means,
            "value_offset": (returns - values).mean().item(),
            "value_offset_last": sum((row.returns - row.values)[-1].item() for row in rows) / len(rows),
            "explained_variance": 1 - ((returns - values).var(correction=0) / returns.var(correction=0)).item(),
        }

    def step(self, name: str, model: torch.nn.Module, loss: torch.Tensor, peak: float, total: int) -> float:
        """One update at the linear schedule's rate; the gradient's norm before clipping."""
        optimizer = self.optimizers[name]
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), self.config.clip_grad).item()
        for group in optimizer.param_groups:
            group["lr"] = peak * (1 - self.steps / (total + 1))
        optimizer.step()
        return norm

    def update(self, rows: list[Row], total: int) -> dict[str, float]:
        """One minibatch: value, then policy."""
        config, count = self.config, sum(len(row.logprobs) for row in rows)
        self.steps += 1
        value_loss = policy_loss = bonus = clipped = entropy = 0.0
        for row in rows:
            now = self.values(row)
            near = torch.minimum(torch.maximum(now, row.values - config.value_clip), row.values + config.value_clip)
            value_loss = (
                value_loss + 0.5 * torch.maximum((now - row.returns) ** 2, (near - row.returns) ** 2).sum() / count
            )
        value_norm = self.step("value", self.critic, value_loss, config.value_lr, total)
        for row in rows:
            odds = self.logits(self.policy, row).log_softmax(-1)
            ratio = (odds[torch.arange(len(row.logprobs)), torch.tensor(row.tokens[row.start :])] - row.logprobs).exp()
            near = ratio.clamp(1 - config.clip_ratio, 1 + config.clip_ratio)
            gain = torch.minimum(ratio * row.advantages, near * row.advantages)
            if config.dual_clip:
                gain = torch.where(row.advantages < 0, torch.maximum(gain, config.dual_clip * row.advantages), gain)
            policy_loss = policy_loss - gain.sum() / count
            spread = -(odds.exp() * odds).sum()
            bonus = bonus + config.entropy_coef * spread / count
            clipped += (near * row.advantages < ratio * row.advantages).sum().item() / count
            entropy += spread.item() / count
        norm = self.step("policy", self.policy, policy_loss - bonus, config.lr, total)
        return {
            "value_loss": value_loss.item(),
            "policy_loss": policy_loss.item(),
            "clip_fraction": clipped,
            "entropy": entropy,
            "grad_norm": norm,
            "value_grad_norm": value_norm,
        }

    def iterate(self, iteration: int) -> dict[str, float]:
        """Iteration, from 1 -> its metrics."""
        config, size = self.config, self.config.rollout_batch_size
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + iteration)
        uniforms = torch.rand(size, config.response_length, generator=generator).tolist()
        indices = [index for index in self.sampler.next_batch() for _ in range(config.group_size)]
        rows = [self.sample(self.prompts[index], draws) for index, draws in zip(indices, uniforms, strict=True)]
        metrics, minibatches = self.judged(rows), range(0, size, config.global_batch_size)
        total, orders = config.iterations * config.epochs * len(minibatches), [range(size)]
        for epoch in range(1, config.epochs):  # each later pass in an order of its own
            orders.append(
                Permutation(size, f"epoch {epoch} of iteration {iteration}, seed {config.seed}")[np.arange(size)]
            )
        made = [
            self.update([rows[row] for row in order[first : first + config.global_batch_size]], total)
            for order in orders
            for first in minibatches
        ]
        return metrics | {name: sum(one[name] for one in made) / len(made) for name in made[0]}
