"""Configuration that all training stages share. Standard library only.

Each stage's own fields are in training/config/trainers.py.
"""

from __future__ import annotations

from dataclasses import dataclass

from training.config.schema import at_least, one_of, positive
from training.errors import ConfigError


@dataclass(frozen=True)
class Paths:
    output: str
    """The stage's own folder: checkpoints/, latest, metrics.jsonl, tensorboard/."""
    model: str
    """Hugging Face folder of the starting model: shape (config.json) and tokenizer."""
    init: str
    """Stage folder whose checkpoint this stage starts from."""
    train: str
    """Training rows, JSON lines."""
    heldout: str
    """Held-out rows, JSON lines."""


@dataclass(frozen=True)
class PPOPaths(Paths):
    reward: str
    """Stage folder of the reward model: reward and value start from it."""
    reward_iteration: int = 0
    """Iteration of the reward model to load; 0 = its last."""


@dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    """Fields of all trainers. Contradictions raise ValueError when the object is created."""

    seed: int = 1234
    """Seed of data order, initialisation and sampling."""
    precision: str = "bf16"
    """"bf16" (fp32 master weights, fp32 gradient reduction) or "fp32"."""
    optimizer_precision: str = "fp32"
    """"fp32" (weights and Adam's moments: 18 bytes a parameter under bf16) or "bf16" (12: weights
    still exact, moments rounded)."""
    tensor_parallel: int = 1
    """Ranks that share each layer."""
    pipeline_parallel: int = 1
    """Ranks that share the stack of layers; it need not divide them."""
    virtual_pipeline: int = 1
    """Parts of the stack that each pipeline rank holds (interleaved schedule: smaller bubbles, more
    messages); 1 = one."""
    sequence_parallel: bool = False
    """Split activations along the sequence between tensor-parallel ranks."""
    context_parallel: int = 1
    """Must be 1; larger values are rejected with advice."""
    recompute: str = "none"
    """Activations recomputed in the backward pass: "none", "selective" (attention scores, GELU:
    little time) or "full" (each layer)."""
    attention: str = "auto"
    """"auto" ("flex" on a GPU, else "sdpa"), "flex" (FlexAttention), "sdpa" (torch), "flash"
    (flash-attn) or "te" (Transformer Engine)."""
    fused: str = "torch"
    """Norms and AdamW: "torch" (in compiled layers; what was measured), "te" (Transformer Engine)
    or "apex" (neither ever run)."""
    lora_rank: int = 0
    """Rank of low-rank adapters (Hu et al. 2021) on every linear layer: they alone learn, and a
    scalar head; 0 = all weights do."""
    lora_alpha: float = 16.0
    """Adapters' products count alpha / rank times."""
    compile: bool = True
    """Compile each layer into a few fused kernels: on a GPU, not with "sdpa"; takes most of a
    minute once."""
    collective_minutes: int = 60
    """Minutes that a rank waits in a collective before it ends with an error. A whole rollout may
    pass between two collectives."""
    iterations: int
    """Optimizer steps (rlhf, grpo: rollouts)."""
    micro_batch_size: int
    """Rows in one forward pass of one data-parallel rank (reward: queries)."""
    global_batch_size: int
    """Rows in one optimizer step over all data-parallel ranks (reward: queries)."""
    lr: float
    """Peak learning rate."""
    min_lr: float = 0.0
    """Learning rate at the end of the schedule."""
    warmup_iterations: int = 0
    """Optimizer steps of linear warm-up."""
    schedule: str = "cosine"
    """"cosine", "linear" or "constant" decay after warm-up."""
    adam_beta1: float = 0.9
    """Adam's decay of the mean gradient, a step."""
    adam_beta2: float = 0.95
    """Adam's decay of the mean squared gradient, a step."""
    adam_eps: float = 1e-8
    """Added to the root of the mean squared gradient before Adam divides by it."""
    weight_decay: float = 0.0
    """Decoupled weight decay; biases and norms have none."""
    clip_grad: float = 1.0
    """Largest gradient norm."""
    grad_spike: float = 100.0
    """A gradient norm of more than so many times its running mean is a spike: that update is left
    out; 0 = off."""
    skip_updates: int = 3
    """Updates in a row that may be left out (loss or gradient not finite, or a spike) before the
    stage stops; 0 = none."""
    save_every: int = 100
    """Iterations between checkpoints; the last is always saved."""
    keep_checkpoints: int = 2
    """Checkpoints kept; the one a later stage asks for by number must be among them."""
    keep_every: int = 0
    """Checkpoints at multiples of this many iterations are never deleted; 0 = none."""
    async_save: bool = False
    """Write checkpoints while training goes on; each node needs host memory for a copy of what its
    ranks write."""
    eval_every: int = 100
    """Iterations between evaluations on the held-out rows; the last is always evaluated."""
    log_every: int = 10
    """Iterations between lines of the log."""
    wandb: str = "off"
    """Weights & Biases in addition to metrics.jsonl: "off", "offline" (files, for ``wandb sync``)
    or "online" (needs WANDB_API_KEY)."""
    mlflow: str = ""
    """MLflow's tracking address ("http://host:5000", "file:///folder"), in addition to
    metrics.jsonl; "" = none."""
    tracking_project: str = "convoy"
    """W&B's project, MLflow's experiment."""

    def __post_init__(self):
        self._check_choices()
        self._check_ranges()
        self._check_saving()
        self._check_lengths()
        self._check_optimizer()
        self._check_layout()

    def _check_choices(self) -> None:
        one_of(self, "precision", ("bf16", "fp32"))
        one_of(self, "wandb", ("off", "online", "offline"))
        one_of(self, "optimizer_precision", ("fp32", "bf16"))
        one_of(self, "schedule", ("cosine", "linear", "constant"))
        one_of(self, "recompute", ("none", "selective", "full"))
        one_of(self, "fused", ("torch", "te", "apex"))
        one_of(self, "attention", ("auto", "flash", "te", "flex", "sdpa"))

    def _check_ranges(self) -> None:
        positive(self, "lr", "adam_eps", "clip_grad", "lora_alpha")
        for name in ("adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}: expected at least 0 and below 1")
        at_least(
            self,
            1,
            "iterations",
            "micro_batch_size",
            "global_batch_size",
            "tensor_parallel",
            "pipeline_parallel",
            "virtual_pipeline",
            "save_every",
            "keep_checkpoints",
            "eval_every",
            "log_every",
            "collective_minutes",
        )
        at_least(
            self,
            0,
            "keep_every",
            "skip_updates",
            "grad_spike",
            "lora_rank",
            "min_lr",
            "weight_decay",
            "warmup_iterations",
        )
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr = {self.min_lr}: expected at most lr = {self.lr}")

    def _check_saving(self) -> None:
        if self.keep_every % self.save_every:
            raise ValueError(
                f"keep_every = {self.keep_every} is not a multiple of save_every = {self.save_every}: "
                "nothing is saved there"
            )

    def _check_lengths(self) -> None:
        if self.global_batch_size % self.micro_batch_size:
            raise ValueError(
                f"global_batch_size = {self.global_batch_size} is not a multiple of "
                f"micro_batch_size = {self.micro_batch_size}"
            )
        if self.warmup_iterations >= self.iterations and self.warmup_iterations:
            raise ValueError(
                f"warmup_iterations = {self.warmup_iterations}: expected fewer than iterations = {self.iterations}"
            )

    def _check_optimizer(self) -> None:
        if self.optimizer_precision == "bf16" and self.fused != "torch":
            raise ValueError(
                f'optimizer_precision = "bf16" is an AdamW of its own; set fused = "torch", not "{self.fused}"'
            )
        if self.optimizer_precision == "bf16" and self.precision != "bf16":
            raise ValueError(f'optimizer_precision = "bf16" needs precision = "bf16", not "{self.precision}"')

    def _check_layout(self) -> None:
        if self.sequence_parallel and self.tensor_parallel == 1:
            raise ValueError("sequence_parallel = true needs tensor_parallel > 1; set sequence_parallel = false")
        if self.context_parallel != 1:
            raise ValueError(
                f"context_parallel = {self.context_parallel}: attention is not divided along the sequence; set it to "
                '1. For long rows use tensor_parallel with sequence_parallel = true, or recompute = "full"'
            )
        if self.virtual_pipeline > 1 and self.pipeline_parallel == 1:
            raise ValueError(
                f"virtual_pipeline = {self.virtual_pipeline} needs pipeline_parallel > 1; set virtual_pipeline = 1"
            )

    LENGTH = "seq_length"
    """The settings that ``longest_row`` comes from, as messages name them."""

    @property
    def longest_row(self) -> int:
        """Tokens of the longest row that a forward pass may see."""
        return self.seq_length

    def model_copies(self, world_size: int) -> int:
        """Data-parallel size for ``world_size`` ranks. Raises ConfigError where TP x PP does not
        divide them."""
        model_ranks = self.tensor_parallel * self.pipeline_parallel
        if world_size % model_ranks:
            raise ConfigError(
                f"{world_size} ranks can't be divided into tensor_parallel {self.tensor_parallel} x "
                f"pipeline_parallel {self.pipeline_parallel} = {model_ranks}; use a multiple of {model_ranks} ranks"
            )
        return world_size // model_ranks

    def data_parallel(self, world_size: int) -> int:
        """Data-parallel size for ``world_size`` ranks. Raises ConfigError where the batch does not
        divide among them."""
        data_ranks = self.model_copies(world_size)
        if self.global_batch_size % (self.micro_batch_size * data_ranks):
            raise ConfigError(
                f"global_batch_size = {self.global_batch_size} is not a multiple of micro_batch_size "
                f"{self.micro_batch_size} x {data_ranks} data-parallel ranks"
            )
        micro_batches = self.global_batch_size // (self.micro_batch_size * data_ranks)
        if self.virtual_pipeline > 1 and micro_batches % self.pipeline_parallel:
            raise ConfigError(
                f"virtual_pipeline = {self.virtual_pipeline}: the interleaved schedule takes micro-batches in groups "
                f"of pipeline_parallel = {self.pipeline_parallel}, but global_batch_size {self.global_batch_size} / "
                f"micro_batch_size {self.micro_batch_size} / {data_ranks} data-parallel ranks = {micro_batches}; "
                "change one of them or set virtual_pipeline = 1"
            )
        return data_ranks
