"""Memory of one GPU, estimated before anything is queued: what each model of a stage keeps, and
what its worst moment adds.

The formula, in bytes; P = parameters of this rank, T = tokens of a micro-batch, h = hidden size, t,
p, d = TP, PP, DP:

* a trained model under bf16: weights 2 P, fp32 gradients 4 P, and of the fp32 master weights and
  Adam's two moments 12 P / d, which the distributed optimizer shards (Rajbhandari et al. 2020, ZeRO
  stage 1); a frozen model: 2 P. fp32: 4, 4, 8 / d and 4. optimizer_precision "bf16" has 6 P / d
  instead of 12. With low-rank adapters the model is frozen, and only they have the rest.
* a layer's activations, k = width of all keys, f = of the feed-forward part: T (8 h + (4 h + 4 k +
  4 f) / t), for BLOOM T h (8 + 24 / t); with sequence parallelism t divides the first 8 h, too. A
  gated feed-forward part keeps 8 f. This is Korthikanti et al. 2022 (arXiv:2205.05198), equations 2
  and 4, without what we do not keep: dropout masks (no dropout) and attention scores (a fused
  kernel). Selective recompute keeps half of the feed-forward part's; full keeps 2 T h a layer, and
  one layer's activations at a time. The first pipeline stage keeps those of min(p, micro-batches)
  at once.
* attention "sdpa" with ALiBi or packed rows: a bias of all pairs, heads / t x length^2 numbers, and
  of packed rows one more a row.
* the language model's head: the fp32 logits of a chunk of tokens
  (training.config.shape.CHUNK_LOGITS). Log-probabilities and entropies of all other tokens are
  numbers (training.models.heads).
* offload = "frozen": of the frozen models one at a time. offload = "all": in addition to the
  trained models' weights the worst of one model's update (its gradients and optimizer among it),
  both optimizers (one goes while the other comes; a save), a scoring pass, and the rollout. What
  waits in host memory has its place there all the time.
* rollout: all layers' weights where generation's layout is not training's, keys and values 4 k / t
  bytes a token and layer (t: generation's TP), and a step's fp32 logits or a prefill's activations.

Held against torch's peak on one H200 by tests/launcher/estimates/test_memory.py: our SFT of 560m
and 1b7, batch 1 and 4, each recompute, 1 to 3 % above the measured; 7b1 and 1b7 of an earlier
prototype within 5 %. What the allocator can't reuse is in OUTSIDE_GB.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from eval.config import MTBenchConfig
from launcher.config.sections import Profile, Resources
from training.config.shape import CHUNK_LOGITS, Shape
from training.config.trainers import PPOConfig, RewardConfig, RolloutConfig, SFTConfig, TrainerConfig
from training.errors import ConfigError

GB = 1e9
OUTSIDE_GB = 2.5
"""Of each GPU: the CUDA context, NCCL's buffers and what the allocator can't use again."""
FITS = 0.9
"""Of a GPU's memory, what an estimate may be: above, it is warned of."""
LEAST_ROWS, PREFILL_TOKENS = 8, 8192
"""Of a rollout: rows whose cache must fit (fewer would be slow), and
training.generation.engine.EngineLimits.prefill_tokens."""
OPTIMIZER = {("bf16", "fp32"): 12, ("bf16", "bf16"): 6, ("fp32", "fp32"): 8}
"""Bytes a parameter, by precision and optimizer_precision: fp32 weights and both moments;
training.optim.adamw's; moments alone."""
REPLIES = 2
"""Replies to a query that the estimate of reward and dpo assumes; their rows are micro_batch_size x
this."""


@dataclass(frozen=True)
class Estimate:
    """GB of one GPU of one stage, at its worst moment."""

    lines: tuple[tuple[str, float], ...]
    """(what, GB), in the order of the formula."""
    host: tuple[tuple[str, float], ...] = ()
    """The same of this rank's part of its node's memory, pinned."""

    @property
    def total(self) -> float:
        return sum(gb for _, gb in self.lines) + OUTSIDE_GB

    @property
    def static(self) -> float:
        """Weights, gradients and optimizer: no batch size changes these."""
        return sum(gb for what, gb in self.lines if ":" in what)


@dataclass(frozen=True)
class Rank:
    """One pipeline stage's share of the model."""

    shape: Shape
    config: TrainerConfig
    data: int
    """Data-parallel size."""
    stage: int

    @property
    def first(self) -> bool:
        return self.stage == 0

    @property
    def last(self) -> bool:
        return self.stage == self.config.pipeline_parallel - 1

    def layers(self, head: str) -> int:
        return sum(
            self.shape.chunk_layers(self.config.pipeline_parallel, self.config.virtual_pipeline, head)[self.stage]
        )

    @property
    def embedding(self) -> int:
        """Parameters of the vocabulary's matrix, which first and last stage hold."""
        return self.shape.padded_vocab(self.config.tensor_parallel) // self.config.tensor_parallel * self.shape.hidden

    @property
    def word(self) -> int:
        """Bytes of a weight or an activation."""
        return 2 if self.config.precision == "bf16" else 4

    def parameters(self, head: str) -> int:
        """Of this rank: what tensor parallelism splits is divided, the rest (norms, row-parallel
        biases) is on every rank."""
        table, output = self.shape.table, self.last and head == "lm"

        def count(weights) -> int:
            return sum(
                math.prod(one.size) // (1 if one.split is None else self.config.tensor_parallel) for one in weights
            )

        matrices = (self.first or output) if self.shape.tied else self.first + output
        ends = matrices * self.embedding + self.first * count(table.first[1:]) + self.last * count(table.last)
        return self.layers(head) * count(table.layer) + ends

    def adapters(self, head: str) -> int:
        """Parameters of this rank's low-rank adapters."""
        return self.layers(head) * self.shape.adapters(self.config.lora_rank, self.config.tensor_parallel)

    def trained(self, name: str, head: str) -> list[tuple[str, float]]:
        """With adapters they alone have gradients and an optimizer."""
        learning, optimizer = self.parameters(head), OPTIMIZER[self.config.precision, self.config.optimizer_precision]
        frozen = self.frozen(name, head) if self.config.lora_rank else []
        name, learning = (f"{name} adapters", self.adapters(head)) if frozen else (name, learning)
        state = "16 bits more of the weights" if self.config.optimizer_precision == "bf16" else "fp32 weights"
        return [
            *frozen,
            (f"{name}: weights", self.word * learning / GB),
            (f"{name}: fp32 gradients", 4 * learning / GB),
            (f"{name}: {state}, Adam / DP {self.data}", optimizer * learning / self.data / GB),
        ]

    def frozen(self, name: str, head: str) -> list[tuple[str, float]]:
        return [(f"{name}: weights", self.word * self.parameters(head) / GB)]

    def activations(self, tokens: int, micro_batches: int, head: str) -> float:
        """GB that forward keeps for backward, of all micro-batches in flight."""
        config, shape, one = self.config, self.shape, tokens * self.shape.hidden * self.word / 2 / GB
        tensor, sequence_ranks = config.tensor_parallel, config.tensor_parallel if config.sequence_parallel else 1
        feed_forward = (
            (4 if config.recompute == "selective" else 8)
            * shape.ffn_hidden
            * (1 if shape.gated else 0.5)
            / shape.hidden
        )
        # normed queries and keys are kept next to what is normed
        attention = (4 + 4 * shape.kv_heads / shape.heads) * (1.5 if shape.qk_norm else 1)
        attention *= shape.attention_width / shape.hidden
        layer = one * (8 / sequence_ranks + (attention + feed_forward) / tensor)
        per_layer = one * 2 / sequence_ranks if config.recompute == "full" else layer
        pipeline, virtual = config.pipeline_parallel, config.virtual_pipeline
        flights = min(pipeline - self.stage, micro_batches)
        # Narayanan et al. 2021 (arXiv:2104.04473): interleaving holds a few more
        if virtual > 1 and self.first:
            flights *= 1 + (pipeline - 1) / (pipeline * virtual)
        return (
            self.layers(head) * per_layer * flights
            + (layer if config.recompute == "full" else 0)
            + 4 * one / sequence_ranks
        )

    def bias(self, tokens: int) -> float:
        """GB of SDPA's bias of all pairs, which ALiBi needs, and packed rows each for itself."""
        config, length = self.config, self.config.longest_row
        packed = getattr(config, "packing", False) or getattr(config, "micro_batch_tokens", 0)
        if config.attention != "sdpa" or not (self.shape.alibi or packed):
            return 0.0
        heads = self.shape.heads // config.tensor_parallel
        return self.word * heads * length**2 * (1 + (-(-tokens // length) if packed else 0)) / GB

    def head(self, tokens: int) -> float:
        """GB for a chunk's logits, fp32 at any precision."""
        columns = self.shape.padded_vocab(self.config.tensor_parallel) // self.config.tensor_parallel
        return 4 * min(tokens * columns, CHUNK_LOGITS) / GB if self.last else 0.0


def estimate(shape: Shape, config: TrainerConfig, ranks: int) -> Estimate:
    """The pipeline stage that needs most. Raises ConfigError where the layout does not divide."""
    data = config.data_parallel(ranks)
    stages = [Rank(shape, config, data, stage) for stage in range(config.pipeline_parallel)]
    return max(
        (_rollouts(rank) if isinstance(config, RolloutConfig) else _trainer(rank) for rank in stages),
        key=lambda candidate: candidate.total,
    )


def _trainer(rank: Rank) -> Estimate:
    config = rank.config
    micro_batches = config.global_batch_size // (config.micro_batch_size * rank.data)
    head = "scalar" if isinstance(config, RewardConfig) else "lm"
    tokens = config.micro_batch_size * (1 if isinstance(config, SFTConfig) else REPLIES) * config.seq_length
    lines = [
        *rank.trained("model", head),
        ("activations", rank.activations(tokens, micro_batches, head) + rank.bias(tokens)),
    ]
    return Estimate((*lines, *([("logits and loss", rank.head(tokens))] if head == "lm" else [])))


def _rollouts(rank: Rank) -> Estimate:
    config = rank.config
    learners = [
        rank.trained("policy", "lm"),
        *([rank.trained("value", "scalar")] if isinstance(config, PPOConfig) else []),
    ]
    # with adapters it is the policy
    reference = [] if config.lora_rank or not config.kl_coef else rank.frozen("reference", "lm")
    frozen = [*reference, *rank.frozen("reward", "scalar")]
    length = config.prompt_length + config.response_length
    tokens = config.micro_batch_tokens or config.micro_batch_size * length
    micro_batches = -(-config.global_batch_size * length // (tokens * rank.data))
    update = [
        ("activations of an update", rank.activations(tokens, micro_batches, "lm") + rank.bias(tokens)),
        ("logits and loss", rank.head(tokens)),
    ]
    score = [max(frozen, key=_gb)] if config.offload != "none" else frozen  # one of them at a time
    if config.offload == "all":
        weights, states = [line for lines in learners for line in lines[:-2]], [lines[-1] for lines in learners]
        updates = [[*lines[-2:], *update] for lines in learners]
        worst = max(*updates, states, [*score, states[-1]], _engine(rank), key=_sum)
        return Estimate((*weights, *worst), (*frozen, *states))
    static = [line for lines in learners for line in lines]
    if config.offload == "frozen":
        return Estimate((*static, *max(update, _engine(rank), score, key=_sum)), tuple(frozen))
    return Estimate((*static, *frozen, *max(update, _engine(rank), key=_sum)))


def _gb(line: tuple[str, float]) -> float:
    return line[1]


def _sum(lines: list[tuple[str, float]]) -> float:
    return sum(map(_gb, lines))


def _engine(rank: Rank) -> list[tuple[str, float]]:
    """What the rollout engine can't do without. Its cache takes what is free beyond that, up to
    ``cache_share``."""
    config, shape = rank.config, rank.shape
    size = config.generation_tensor_parallel or config.tensor_parallel
    rows = min(config.generation_batch_size, config.rollout_batch_size // rank.data)
    least = min(LEAST_ROWS, rows)
    token = 2 * rank.word * shape.layers * shape.kv_heads * shape.head_dim / size
    # adapters are merged into a copy
    moved = config.pipeline_parallel > 1 or size != config.tensor_parallel or config.lora_rank
    weights = [(f"weights for rollouts at TP {size}", rank.word * shape.parameters() / size / GB)] if moved else []
    working = max(
        8 * rows * shape.vocab,
        PREFILL_TOKENS * rank.word * (2 * shape.ffn_hidden / size + 4 * max(shape.hidden, shape.attention_width)),
    )
    cache = token * least * (config.prompt_length + config.response_length)
    return [
        *weights,
        (f"keys and values of {least} rows (more where there is room)", cache / GB),
        ("logits or prefill of a rollout", working / GB),
    ]


@dataclass(frozen=True)
class Knob:
    setting: str
    """What to add to the command line."""
    total: float
    """GB with it."""


def knobs(stage: str, shape: Shape, config: TrainerConfig, resources: Resources, profile: Profile) -> list[Knob]:
    """Changes of one setting that free memory, the one that frees most first."""
    now, helpful = estimate(shape, config, resources.ranks).total, []
    for setting, changed, ranks in _changes(stage, shape, config, resources, profile):
        try:
            total = estimate(shape, changed(), ranks).total
        except (ConfigError, ValueError):
            continue  # this layout does not divide the batch
        if total < now - 0.05:
            helpful.append(Knob(setting, total))
    return sorted(helpful, key=lambda knob: knob.total)


SMALLER = 1000
"""A micro-batch is divided by at most this at once."""


def _changes(stage: str, shape: Shape, config: TrainerConfig, resources: Resources, profile: Profile):
    """(command line, function that makes the configuration, ranks)."""

    def keys(**changes):
        options = " ".join(f"--set {stage}.{key}={str(value).lower()}" for key, value in changes.items())
        return options, lambda: dataclasses.replace(config, **changes)

    tensor = 2 * config.tensor_parallel
    if isinstance(config, RolloutConfig) and config.micro_batch_tokens:
        half = max(config.micro_batch_tokens // 2, config.prompt_length + config.response_length)
        yield *keys(micro_batch_tokens=half), resources.ranks
    elif config.micro_batch_size > 1:
        fewer = next(
            (config.micro_batch_size // by for by in range(2, SMALLER) if config.micro_batch_size % by == 0), 1
        )
        yield *keys(micro_batch_size=fewer), resources.ranks
    if config.precision == "bf16" and config.optimizer_precision != "bf16":
        yield *keys(optimizer_precision="bf16"), resources.ranks
    if config.recompute != "full":
        yield *keys(recompute="full"), resources.ranks
    if config.tensor_parallel > 1 and not config.sequence_parallel:
        yield *keys(sequence_parallel=True), resources.ranks
    if tensor <= profile.gpus_per_node and shape.kv_heads % tensor == 0:
        options, changed = keys(tensor_parallel=tensor, sequence_parallel=True)
        nodes, gpus = resources.nodes, max(resources.ranks_per_node, tensor)
        more = "" if gpus == resources.ranks_per_node else f" --set resources.{stage}.gpus_per_node={gpus}"
        yield options + more, changed, nodes * gpus
    if (stages := 2 * config.pipeline_parallel) * config.virtual_pipeline <= shape.layers:
        options, changed = keys(pipeline_parallel=stages)
        nodes = resources.nodes if resources.ranks % (stages * config.tensor_parallel) == 0 else 2 * resources.nodes
        if nodes <= max(resources.nodes, profile.max_nodes):
            more = "" if nodes == resources.nodes else f" --set resources.{stage}.nodes={nodes}"
            yield options + more, changed, nodes * resources.ranks_per_node
    if 2 * resources.nodes <= profile.max_nodes:
        yield f"--set resources.{stage}.nodes={2 * resources.nodes}", lambda: config, 2 * resources.ranks
    if isinstance(config, RolloutConfig):
        for more in {"none": ("frozen", "all"), "frozen": ("all",), "all": ()}[config.offload]:
            yield *keys(offload=more), resources.ranks


def relief(stage: str, shape: Shape, config: TrainerConfig, resources: Resources, profile: Profile) -> str:
    """What to do about a stage that ran out of memory: the estimate, and what it would be with
    other settings."""
    current = estimate(shape, config, resources.ranks)
    ways = [
        f"{knob.setting} ({current.total - knob.total:.1f} GB less)"
        for knob in knobs(stage, shape, config, resources, profile)
    ]
    advice = f"by estimate it needs {current.total:.1f} GB of each GPU, {current.static:.1f} of them for "
    advice += "weights, gradients and optimizer; "
    if current.total <= FITS * profile.gpu_memory_gb:
        advice += f"that should fit {profile.gpu_memory_gb:g} GB: is another process on the GPU (nvidia-smi)? If not, "
    return f"{advice}what frees memory, in a new run (--name): {'; '.join(ways) or 'nothing that one setting can do'}"


def check(stage: str, shape: Shape, config: TrainerConfig, resources: Resources, profile: Profile) -> str:
    """A warning where the estimate comes close to what the profile's GPU has, else ""; ConfigError,
    with what would free how much, where it is more than 10 % above (the estimate's own error)."""
    current, gpu_gb = estimate(shape, config, resources.ranks), profile.gpu_memory_gb
    if current.total <= FITS * gpu_gb:
        return ""
    ways = [f"  {knob.total:6.1f} GB with {knob.setting}" for knob in knobs(stage, shape, config, resources, profile)]
    text = (
        f"{stage} needs about {current.total:.0f} GB of each GPU, {current.static:.0f} of it for weights, gradients "
        f"and optimizer; the profile's gpu_memory_gb is {gpu_gb:g}"
    )
    if current.total > 1.1 * gpu_gb or current.static > gpu_gb:
        raise ConfigError("\n".join([f"{text}; it would run out of memory. What helps:", *ways]))
    return "\n".join([f"{text}: it may not fit. What would help:", *ways])


def check_evaluation(shape: Shape, config: MTBenchConfig, profile: Profile) -> str:
    """A warning where a model comes close to what one GPU has, else ""; ConfigError where it has
    more: each rank of the evaluation
    loads whole models, one at a time. The held-out replies' divergence is computed in fp32."""
    weights = 4 * shape.parameters() / GB
    tokens = config.batch_size * config.context_length
    cache = 4 * tokens * shape.layers * shape.kv_heads * shape.head_dim / GB  # bf16, keys and values
    needs = max(weights, weights / 2 + cache) + OUTSIDE_GB
    if needs <= FITS * profile.gpu_memory_gb:
        return ""
    text = (
        f"mtbench needs about {needs:.0f} GB of one GPU (a model's weights in fp32 {weights:.0f} GB; in bf16 with "
        f"keys and values of {config.batch_size} rows of {config.context_length} tokens {weights / 2 + cache:.0f} "
        f"GB), and does not divide a model between GPUs; the profile's gpu_memory_gb is {profile.gpu_memory_gb:g}"
    )
    if weights > profile.gpu_memory_gb:
        raise ConfigError(
            f"{text}; it would run out of memory after all training: submit the "
            "chain with --until export and evaluate runs/NAME/export elsewhere"
        )
    return f"{text}: it may not fit; a smaller mtbench.batch_size or mtbench.context_length needs less"


def check_host(stage: str, current: Estimate, resources: Resources, profile: Profile) -> str:
    """A warning where what waits in pinned host memory comes close to what the job asks of a node,
    else ""; ConfigError where it is more: Slurm would end the job. All else in host memory (torch,
    data, a save under way) comes on top and is not counted."""
    waits, has = (
        sum(gb for _, gb in current.host) * resources.ranks_per_node,
        profile.share_gib(resources.gpus_per_node) * 2**30 / GB,
    )
    if not has or waits <= FITS * has:
        return ""
    text = (
        f"{stage} keeps {waits:.0f} GB pinned in a node's memory (offload); the job asks for {has:.0f} GB of it, by "
        f"the profile's mem_gb = {profile.mem_gb} GiB and {resources.gpus_per_node} of {profile.gpus_per_node} GPUs"
    )
    if waits > has:
        raise ConfigError(
            f"{text}; the kernel would end it. Ask for more GPUs of a node, or use --set {stage}.offload=frozen or none"
        )
    return f"{text}: it may not fit, with all else that is there"
