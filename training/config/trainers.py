"""Every training stage's configuration: one frozen dataclass a stage. Standard library only.

The launcher merges recipe, file and command line into these classes. A stage reads its own back
from its one argument, a JSON file. Defaults are those of ChatLearn v0.1.0's BLOOM recipe where they
are sound. The launcher fills ``paths``, which is no key of a recipe. Contradictions raise
``ValueError`` when the object is created.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from training.config.schema import at_least, below, number, one_of, positive
from training.config.trainer_config import Paths, PPOPaths, TrainerConfig

__all__ = [
    "DPOConfig",
    "GRPOConfig",
    "PPOConfig",
    "PPOPaths",
    "Paths",
    "RewardConfig",
    "RolloutConfig",
    "SFTConfig",
    "TrainerConfig",
]


@dataclass(frozen=True, kw_only=True)
class SFTConfig(TrainerConfig):
    """Section ``sft``: next-token loss on responses only, one denominator for the whole batch."""

    paths: Paths
    seq_length: int = 2048
    """Longest row in tokens, prompt and response together."""
    packing: bool = True
    """Put several examples of a global batch into one row, each seeing only itself: the same loss,
    less padding."""
    iterations: int = 1000
    micro_batch_size: int = 8
    global_batch_size: int = 64
    lr: float = 2e-5
    warmup_iterations: int = 40
    adam_beta2: float = 0.999
    patience: int = 0
    """Evaluations in a row without a lower held-out loss after which training ends; later stages
    then use the checkpoint with the lowest. 0 = train to the end and use the last."""
    min_delta: float = 0.0
    """Nats by which the held-out loss must fall to count as lower."""
    sample_every: int = 100
    """Iterations between greedy replies to held-out prompts in the log and in TensorBoard; 0 =
    none."""
    sample_prompts: int = 2
    """Held-out prompts that are answered then."""
    sample_length: int = 128
    """Most tokens of such a reply; at most half of seq_length is used."""

    def __post_init__(self):
        super().__post_init__()
        at_least(self, 2, "seq_length")
        at_least(self, 1, "sample_prompts", "sample_length")
        at_least(self, 0, "patience", "min_delta", "sample_every")


@dataclass(frozen=True, kw_only=True)
class RewardConfig(TrainerConfig):
    """Section ``reward``: pairwise ranking loss over the replies to one query."""

    paths: Paths
    seq_length: int = 2048
    """Longest query with one response, in tokens."""
    packing: bool = True
    """Put the queries of a global batch, each with all its replies, into as few rows as hold them;
    each reply sees its query only."""
    iterations: int = 3600
    micro_batch_size: int = 4
    global_batch_size: int = 64
    lr: float = 1e-5
    warmup_iterations: int = 300
    weight_decay: float = 0.1
    load_iteration: int = 0
    """Iteration of this reward model that rlhf starts from; 0 = the last (REWARD_LOAD_ITERATION of
    the tutorial)."""
    calibration_samples: int = 256
    """Responses of the SFT policy to training prompts whose mean score every checkpoint's bias
    makes 0; 0 = no bias."""
    calibration_length: int = 512
    """Most tokens of such a response; at most half of seq_length is used."""

    def __post_init__(self):
        super().__post_init__()
        at_least(self, 2, "seq_length")
        at_least(self, 0, "calibration_samples")
        at_least(self, 1, "calibration_length")


@dataclass(frozen=True, kw_only=True)
class DPOConfig(TrainerConfig):
    """Section ``dpo``: the pairs teach the policy, without a reward model and without samples
    (Rafailov et al. 2023)."""

    paths: Paths
    seq_length: int = 2048
    """Longest row in tokens, query and response together."""
    iterations: int = 1000
    micro_batch_size: int = 4
    """Queries, with all their replies, in one forward pass of one data-parallel rank."""
    global_batch_size: int = 64
    """Queries in one optimizer step over all data-parallel ranks."""
    lr: float = 5e-7
    warmup_iterations: int = 100
    beta: float = 0.1
    """Pull to the SFT model: a reply's implicit reward is beta (log p - log p_ref)."""
    loss: str = "sigmoid"
    """"sigmoid" (Rafailov et al. 2023) or "ipo" (Azar et al. 2024)."""
    label_smoothing: float = 0.0
    """Probability, 0..0.5, that a pair is the wrong way round (conservative DPO); of "sigmoid"
    only."""

    def __post_init__(self):
        super().__post_init__()
        at_least(self, 2, "seq_length")
        positive(self, "beta")
        one_of(self, "loss", ("sigmoid", "ipo"))
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"label_smoothing = {self.label_smoothing}: expected at least 0 and below 0.5")
        if self.label_smoothing and self.loss == "ipo":
            raise ValueError(
                f'label_smoothing = {self.label_smoothing}: "ipo" has none; set it to 0 or loss = "sigmoid"'
            )


@dataclass(frozen=True, kw_only=True)
class RolloutConfig(TrainerConfig):
    """Fields that PPO and GRPO share: the policy learns from its own samples, which the reward
    model scores."""

    group_size: ClassVar[int] = 1
    value_warmup: ClassVar[int] = 0
    paths: PPOPaths
    prompt_length: int = 1024
    """Longest prompt in tokens; a longer one loses its head."""
    response_length: int = 512
    """Most new tokens of a rollout."""
    rollout_batch_size: int = 1024
    """Samples an iteration, over all data-parallel ranks."""
    generation_batch_size: int = 256
    """Most rows that one replica of the rollout engine generates together; the cache may hold fewer
    at a time."""
    generation_tensor_parallel: int = 0
    """Ranks that share each layer in generation, which has no pipeline; 0 = as in training. TP x PP
    ranks make TP x PP / this replicas."""
    cache_share: float = 0.9
    """Of the GPU memory that is free when a rollout begins, its key-value cache takes at most
    this."""
    epochs: int = 1
    """Passes over an iteration's samples."""
    micro_batch_size: int = 2
    micro_batch_tokens: int = 0
    """Most tokens in one forward pass of one data-parallel rank, its rows packed with samples by
    length; 0 = micro_batch_size samples, padded. Losses are the same, less padding is computed."""
    global_batch_size: int = 128
    schedule: str = "linear"
    weight_decay: float = 0.01
    clip_grad: float = 0.5
    temperature: float = 1.0
    """Divides the logits of the rollout, of old and reference log-probabilities, and of updates."""
    offload: str = "none"
    """What moves to pinned host memory while it is idle (each node needs room for its ranks'
    parts): "none", "frozen" (reference and reward model, except while they score) or "all" (also
    optimizer states, except while their model trains; gradients exist only then)."""
    top_p: float = 1.0
    """Must be 1: log-probabilities are of the full distribution. Other values are rejected with
    advice."""
    top_k: int = 0
    """Must be 0, for the reason of top_p."""
    kl_coef: float = 0.02
    """Weight of the per-token KL penalty (its start value when kl_target is set); 0 = none, and no
    reference model: KL is not measured."""
    kl_target: float = 0.0
    """Target KL per response in nats of the adaptive controller (Ziegler et al. 2019); 0 = fixed
    coefficient."""
    kl_horizon: int = 10000
    """Samples over which the adaptive controller corrects."""
    clip_ratio: float = 0.2
    """Clip of the ratio of new to old probability, 1 - clip_ratio .. 1 + clip_ratio (Schulman et
    al. 2017)."""
    clip_ratio_high: float = 0.0
    """Clip of the ratio above 1 (Yu et al. 2025: 0.28); 0 = the same as clip_ratio."""
    dual_clip: float = 0.0
    """Bound of a token's loss where its advantage is negative, in advantages (Ye et al. 2020: 3); 0
    = none."""
    importance_cap: float = 0.0
    """Each token's loss is weighted by min(p / p_rollout, this): p by the training forward,
    p_rollout by the rollout engine that drew the token (truncated importance sampling; Yao et al.
    2025 use 2). 0 = no weight."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus per token in the policy's loss; 0 = none."""
    reward_clip: float = 100.0
    """Largest absolute score of a response; a score beyond it counts as this."""
    missing_eos_penalty: float = -1.0
    """Score of a response that does not end within response_length."""
    keep_replies: bool = False
    """Keep the replies of each evaluation on the held-out prompts in replies.jsonl, e.g. for
    another reward model to score."""
    kl_max: float = 100.0
    """Health gate: most KL to the reference, nats per response."""
    eos_rate_min: float = 0.01
    """Health gate: least share of responses that end."""
    length_correlation_max: float = 0.98
    """Health gate: most correlation of reward and response length."""
    entropy_min: float = 0.01
    """Health gate: least entropy of the policy, nats per token."""
    mult_prob_error_max: float = 1.1
    """Health gate: most token_mult_prob_error, the mean of exp |log p - log p_rollout|: 1 where
    rollout and training agree."""
    gate_after: int = 10
    """Iterations, in addition to value_warmup, after which the gates apply."""
    gate_pause: int = 20
    """A gate breached in so many iterations in a row saves a checkpoint and ends the stage until
    someone resumes it; 0 = never."""
    gate_stop: int = 40
    """A gate breached in so many iterations in a row, pauses not counted, ends the stage without
    saving; 0 = never."""

    def __post_init__(self):
        super().__post_init__()
        at_least(self, 1, "prompt_length", "response_length", "rollout_batch_size", "generation_batch_size", "epochs")
        at_least(
            self,
            0,
            "gate_after",
            "gate_pause",
            "gate_stop",
            "entropy_coef",
            "clip_ratio_high",
            "generation_tensor_parallel",
            "kl_coef",
            "kl_target",
            "micro_batch_tokens",
            "importance_cap",
        )
        self._check_scores_and_kl()
        self._check_clips_and_gates()
        self._check_memory()
        self._check_generation()
        self._check_batches()

    def _check_scores_and_kl(self) -> None:
        if not math.isfinite(self.missing_eos_penalty):
            raise ValueError(f"missing_eos_penalty = {self.missing_eos_penalty}: expected a finite score")
        if self.kl_target and not self.kl_coef:
            raise ValueError(
                f"kl_coef = 0 is what the controller of kl_target = {self.kl_target} multiplies; set a start value"
            )
        if self.kl_target and self.kl_horizon < self.rollout_batch_size:
            raise ValueError(
                f"kl_horizon = {self.kl_horizon}: expected at least rollout_batch_size = {self.rollout_batch_size}, or "
                "one iteration may turn kl_coef negative"
            )

    def _check_clips_and_gates(self) -> None:
        positive(self, "temperature", "clip_ratio", "reward_clip")
        below(self, 1, "clip_ratio")
        number(self, "kl_max", "eos_rate_min", "length_correlation_max", "entropy_min", "mult_prob_error_max")

    def _check_memory(self) -> None:
        one_of(self, "offload", ("none", "frozen", "all"))
        if self.offload == "all" and self.async_save:
            raise ValueError(
                'async_save = true reads the optimizer states while training goes on, but offload = "all" moves them; '
                'set async_save = false or offload = "frozen"'
            )
        if not 0 < self.cache_share <= 1:
            raise ValueError(f"cache_share = {self.cache_share}: expected a share above 0 and at most 1")

    def _check_generation(self) -> None:
        model_ranks = self.tensor_parallel * self.pipeline_parallel
        if self.generation_tensor_parallel and model_ranks % self.generation_tensor_parallel:
            raise ValueError(
                f"generation_tensor_parallel = {self.generation_tensor_parallel} does not divide tensor_parallel x "
                f"pipeline_parallel = {model_ranks}; set it to a divisor or 0"
            )
        for name, off in (("top_p", 1.0), ("top_k", 0)):
            if getattr(self, name) != off:
                raise ValueError(
                    f"{name} = {getattr(self, name)}: samples would come from a truncated distribution, whose "
                    f"log-probabilities ratio and KL do not have; set {name} = {off}, or lower temperature"
                )

    def _check_batches(self) -> None:
        if self.dual_clip and self.dual_clip <= 1:
            raise ValueError(f"dual_clip = {self.dual_clip}: expected 0 (off) or more than 1")
        if self.micro_batch_tokens and self.micro_batch_tokens < self.prompt_length + self.response_length:
            raise ValueError(
                f"micro_batch_tokens = {self.micro_batch_tokens}: expected 0 (off) or at least prompt_length + "
                f"response_length = {self.prompt_length + self.response_length}, so that the longest sample fits"
            )
        if self.rollout_batch_size % self.global_batch_size:
            raise ValueError(
                f"rollout_batch_size = {self.rollout_batch_size} is not a multiple of "
                f"global_batch_size = {self.global_batch_size}"
            )

    LENGTH = "prompt_length + response_length"

    @property
    def longest_row(self) -> int:
        return self.prompt_length + self.response_length

    def data_parallel(self, world_size: int) -> int:
        """As of any trainer. Rows that are packed by micro_batch_tokens divide among any number of
        ranks."""
        return self.model_copies(world_size) if self.micro_batch_tokens else super().data_parallel(world_size)

    @property
    def updates(self) -> int:
        """Optimizer steps of one iteration."""
        return self.epochs * self.rollout_batch_size // self.global_batch_size


@dataclass(frozen=True, kw_only=True)
class PPOConfig(RolloutConfig):
    """Section ``rlhf``: PPO with a KL penalty to the SFT model (rewards per token, GAE, clipped
    policy and value losses)."""

    iterations: int = 5000
    lr: float = 2.4e-7
    value_lr: float = 5e-6
    """Peak learning rate of the value model."""
    warmup_iterations: int = 100
    value_warmup: int = 0
    """First iterations, in which only the value model learns."""
    gamma: float = 1.0
    """Discount a token of generalised advantage estimation (Schulman et al. 2016)."""
    lam: float = 0.95
    """Lambda of generalised advantage estimation."""
    value_clip: float = 0.0
    """How far a value may move from the rollout's before its gradient becomes 0, in the rewards'
    units; 0 = no limit. A limit keeps values from following (docs/evidence/results.md); the BLOOM
    recipes have the 0.1 of ChatLearn's tutorial."""
    value_offset_max: float = 10.0
    """Health gate: most |mean of return - value|, in the rewards' units."""
    explained_variance_min: float = -1000.0
    """Health gate: least explained variance of the values (1 = perfect, 0 = their mean's; far below
    0 while returns hardly differ)."""

    def __post_init__(self):
        super().__post_init__()
        for name in ("gamma", "lam"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} = {getattr(self, name)}: expected between 0 and 1")
        if self.warmup_iterations + self.value_warmup >= self.iterations:
            raise ValueError(
                f"warmup_iterations = {self.warmup_iterations} + value_warmup = {self.value_warmup}: expected fewer "
                f"together than iterations = {self.iterations}"
            )
        at_least(self, 0, "value_warmup", "value_clip")
        positive(self, "value_lr")
        number(self, "explained_variance_min", "value_offset_max")
        if self.min_lr > self.value_lr:
            raise ValueError(f"min_lr = {self.min_lr}: expected at most value_lr = {self.value_lr}")


@dataclass(frozen=True, kw_only=True)
class GRPOConfig(RolloutConfig):
    """Section ``grpo``: PPO's policy update with advantages within groups of samples, without a
    value model (Shao et al. 2024)."""

    group_size: int = 8
    """Samples of each prompt; rollout_batch_size / group_size prompts an iteration."""
    iterations: int = 1000
    lr: float = 1e-6
    warmup_iterations: int = 20
    kl_coef: float = 0.04
    kl_in: str = "loss"
    """Where the KL penalty stands: "loss" (k3 of each token) or "reward" (k1 of the whole sample,
    off its score)."""
    scale_advantages: bool = True
    """Divide by the group's standard deviation; false: Dr. GRPO (Liu et al. 2025)."""

    def __post_init__(self):
        super().__post_init__()
        at_least(self, 2, "group_size")
        one_of(self, "kl_in", ("loss", "reward"))
        if self.rollout_batch_size % self.group_size:
            raise ValueError(
                f"rollout_batch_size = {self.rollout_batch_size} is not a multiple of group_size = {self.group_size}"
            )
