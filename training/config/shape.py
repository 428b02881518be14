"""The model's shape, as Hugging Face's config.json states it, and the layouts that it fits.

Standard library only.
"""

from __future__ import annotations

import dataclasses
import importlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from training.config.data import FAMILIES, ModelConfig
from training.config.hf_config import ConfigFile
from training.config.rope import Rope
from training.errors import ConfigError, InvariantError
from training.files.hf_folder import shown

VOCAB_MULTIPLE = 128
"""The embedding's rows are padded to a multiple of this times the tensor-parallel size (tensor
cores, equal shards)."""
CHUNK_LOGITS = 2**29
"""Most logits that a rank holds at once in training: 2 GiB in fp32, 2,139 tokens of BLOOM without
tensor parallelism."""

EMBEDDING, OUTPUT, SCORE = "embedding.word_embeddings.weight", "output_layer.weight", "score.linear.weight"
"""megatron-core's keys of every family's embedding, output matrix and scalar head."""
VOCABULARY = (EMBEDDING, OUTPUT)
"""Tensors with one row for each token; tensor parallelism pads them."""


@dataclass(frozen=True)
class Weight:
    """One tensor of megatron-core, and the tensors of Hugging Face that it consists of."""

    key: str
    """Its name in the model; of a layer's tensor, its name within the layer."""
    parts: dict[str, tuple[int, ...]]
    """Hugging Face's names, without prefix and layer -> shapes. Several parts are woven into one
    tensor: for each group, the first part's rows of that group, then the second's, ..."""
    split: int | None = None
    """The axis that tensor parallelism splits; None = every rank has the whole tensor."""
    weave_groups: int = 1
    """Number of groups in which several parts are woven; tensor parallelism must not cut a
    group."""

    @property
    def size(self) -> tuple[int, ...]:
        sizes = list(self.parts.values())
        return (sum(size[0] for size in sizes), *sizes[0][1:])


@dataclass(frozen=True)
class Table:
    """All tensors of a model in its order, except those of its head."""

    first: tuple[Weight, ...]
    layer: tuple[Weight, ...]
    """The tensors of each layer."""
    last: tuple[Weight, ...]


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The model's shape. It comes from Hugging Face's config.json and from nowhere else."""

    family: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    """Key-value heads; each serves heads / kv_heads query heads."""
    head_dim: int
    """Width of a head: hidden / heads where config.json does not say otherwise."""
    ffn_hidden: int
    """Width of the feed-forward part; of a gated one, the width after the gate."""
    vocab: int
    """Rows of the embedding in the Hugging Face checkpoint."""
    norm_eps: float
    """Epsilon of the norms."""
    tied: bool
    """The output matrix is the embedding; else the model has its own."""
    gated: bool = False
    """The feed-forward part's first matrix has a second half that gates the first (SwiGLU)."""
    alibi: bool = False
    """Attention with linear biases."""
    rope: Rope | None = None
    """The rotary embedding; None = none."""
    qk_norm: bool = False
    """Each head's query and key are normed (RMSNorm) before the rotation."""
    max_positions: int = 0
    """Most tokens of a row; 0 = any number (ALiBi)."""
    tokens: int = 0
    """Ids that the tokenizer has; the embedding's rows from there on stand for no token, and are
    never sampled. 0 = not known: as many as ``vocab``."""

    @classmethod
    def read(cls, folder: str | Path) -> Shape:
        """Read a model folder's config.json. Raises ConfigError for an unknown family and for a
        model that Convoy does not compute exactly."""
        config = ConfigFile.read(Path(folder) / "config.json")
        name = config.values.get("model_type")
        if not isinstance(name, str) or name not in FAMILIES:
            raise ConfigError(f"{config.path}: model_type = {shown(repr(name))}; expected one of {', '.join(FAMILIES)}")
        return family(name).read(config)

    @classmethod
    def demo(cls, model: ModelConfig) -> Shape:
        """Shape of the model that ``model.checkpoint = "demo"`` creates."""
        kind = family(model.demo_family)
        return kind.read(ConfigFile(Path("demo"), kind.demo(model)))

    @property
    def table(self) -> Table:
        return family(self.family).table(self)

    def weights(self, head: str) -> Iterator[tuple[Weight, int | None, dict[str, tuple[int, ...]]]]:
        """Every tensor in the model's order: (the weight, its layer or None, Hugging Face's names
        without prefix -> shapes). ``head``: as ``head_weights``."""
        table, name = self.table, family(self.family).LAYER
        yield from ((weight, None, weight.parts) for weight in table.first)
        for layer in range(self.layers):
            for weight in table.layer:
                yield weight, layer, {f"{name}.{layer}.{part}": size for part, size in weight.parts.items()}
        yield from ((weight, None, weight.parts) for weight in (*table.last, *self.head_weights(head)))

    def head_weights(self, head: str) -> tuple[Weight, ...]:
        """Tensors of the head. ``head``: "tied" (the output matrix is the embedding: no tensor of
        its own), "untied" or "scalar"."""
        if head == "untied":
            return (Weight(OUTPUT, {"lm_head.weight": (self.vocab, self.hidden)}, 0),)
        if head == "scalar":
            bias = Weight("score.linear.bias", {"score.bias": (1,)})
            return (Weight(SCORE, {"score.weight": (1, self.hidden)}), *([bias] if self.score_bias else []))
        return ()

    def with_tokens(self, tokens: int) -> Shape:
        """The shape whose log-probabilities and samples are of the first ``tokens`` ids alone."""
        return dataclasses.replace(self, tokens=min(tokens, self.vocab))

    @property
    def sampled_vocab(self) -> int:
        """Ids that a sample may have."""
        return self.tokens or self.vocab

    @property
    def attention_width(self) -> int:
        """Width of all heads together: of the queries and of the attention's output."""
        return self.heads * self.head_dim

    @property
    def embedding_norm(self) -> bool:
        """True if a norm follows the embedding."""
        return len(self.table.first) > 1

    @property
    def score_bias(self) -> bool:
        """True if a scalar head has a bias. Hugging Face's heads have none, and an export can fold
        one only into the bias of the last norm (conversion/classifier.py)."""
        return len(self.table.last) > 1

    def check_tensor_parallel(self, size: int, name: str = "tensor_parallel") -> None:
        """Raises ConfigError where ``size`` ranks can't share a layer. ``name``: the setting in the
        message."""
        if self.heads % size:
            fits = ", ".join(str(n) for n in range(1, self.heads + 1) if self.heads % n == 0)
            raise ConfigError(
                f"{name} = {size} does not divide the model's {self.heads} attention heads; choose one of {fits}"
            )
        if self.kv_heads % size:
            fits = ", ".join(
                str(n) for n in range(1, self.kv_heads + 1) if self.kv_heads % n == 0 and self.heads % n == 0
            )
            raise ConfigError(
                f"{name} = {size} does not divide the model's {self.kv_heads} key-value heads; choose one of {fits}"
            )
        if self.ffn_hidden % size:
            raise ConfigError(
                f"{name} = {size} does not divide the model's feed-forward width {self.ffn_hidden}; "
                "choose one that does"
            )

    def check_layout(
        self, tensor_parallel_size: int, pipeline_parallel_size: int, virtual_pipeline_size: int = 1
    ) -> None:
        """Raises ConfigError where the model can't be divided in this way. The message says which
        layouts exist."""
        self.check_tensor_parallel(tensor_parallel_size)
        if virtual_pipeline_size > 1 and pipeline_parallel_size == 1:
            raise ConfigError(
                f"virtual_pipeline = {virtual_pipeline_size} needs pipeline_parallel > 1; set virtual_pipeline = 1"
            )
        chunks = pipeline_parallel_size * virtual_pipeline_size
        if chunks > self.layers:
            what, fix = f"pipeline_parallel = {pipeline_parallel_size}", f"choose any from 1 to {self.layers}"
            if virtual_pipeline_size > 1:
                most = self.layers // pipeline_parallel_size
                what = f"{what} x virtual_pipeline = {virtual_pipeline_size} makes {chunks} parts, which"
                fix = (
                    f"choose a virtual_pipeline from 1 to {most}"
                    if most
                    else f"choose a pipeline_parallel from 1 to {self.layers}"
                )
            raise ConfigError(f"{what} is more than the model's {self.layers} layers; {fix} (parts need not be equal)")

    def check_length(self, name: str, tokens: int) -> None:
        """Raises ConfigError where rows of ``tokens`` tokens exceed the model's positions.
        ``name``: the setting in the message."""
        if self.max_positions and tokens > self.max_positions:
            raise ConfigError(
                f"{name} = {tokens} is more than the model's max_position_embeddings = {self.max_positions}, "
                "and a rotary embedding knows no more positions; set at most that"
            )

    def stage_layers(self, stages: int, head: str = "lm", least: int = 1) -> list[int]:
        """Layers of each pipeline stage: the split whose slowest stage is fastest. Each stage has
        at least ``least`` layers.

        A stage's time is that of its layers. The last stage of a language model also computes the
        output matrix, counted in layers by its multiplications (BLOOM: V / 12 H, 5 layers of
        bloom-7b1, 20 of bloom-560m). The input embedding costs no time but memory of the first
        stage, so layers that do not divide evenly go to the stages after the first.
        """
        if stages == 1:
            return [self.layers]
        output = self.vocab * self.hidden / self.layer_multiplications if head == "lm" else 0.0
        best: tuple[float, int] | None = None
        for last in range(least, self.layers - least * (stages - 1) + 1):
            slowest = max(last + output, -(-(self.layers - last) // (stages - 1)))
            # among equals take the fullest last stage: the other stages then hold less
            if best is None or slowest <= best[0]:
                best = (slowest, last)
        if best is None:
            raise InvariantError(f"{self.layers} layers for {stages} stages of at least {least}")
        each, more = divmod(self.layers - best[1], stages - 1)
        return [each + (stage >= stages - 1 - more) for stage in range(stages - 1)] + [best[1]]

    def chunk_layers(
        self, pipeline_parallel_size: int, virtual_pipeline_size: int = 1, head: str = "lm"
    ) -> list[list[int]]:
        """Layers of each chunk of each pipeline stage: ``[stage][chunk]``. The model's order is
        chunk 0 of every stage, then chunk 1 of every stage, ..."""
        chunks = virtual_pipeline_size
        return [
            [layers // chunks + (chunk < layers % chunks) for chunk in range(chunks)]
            for layers in self.stage_layers(pipeline_parallel_size, head, chunks)
        ]

    @property
    def layer_multiplications(self) -> int:
        """Multiplications of a layer's matrices for one token."""
        return sum(math.prod(weight.size) for weight in self.table.layer if len(weight.size) == 2)

    def parameters(self) -> int:
        """Parameters of the language model. A tied output matrix and vocabulary padding do not
        count."""
        table, head = self.table, self.head_weights("tied" if self.tied else "untied")
        return sum(math.prod(weight.size) for weight in (*table.first, *self.layers * table.layer, *table.last, *head))

    def adapters(self, rank: int, tensor_parallel_size: int = 1) -> int:
        """Parameters of one layer's low-rank adapters on a tensor-parallel rank.

        Of a matrix that is split by rows the rank has the whole A (rank, columns), of one that is
        split by columns the whole B (rows, rank).
        """
        matrices = [weight for weight in self.table.layer if len(weight.size) == 2]
        return rank * sum(
            size // (tensor_parallel_size if weight.split == axis else 1)
            for weight in matrices
            for axis, size in enumerate(weight.size)
        )

    def padded_vocab(self, tensor_parallel_size: int) -> int:
        """Rows of the embedding on megatron-core, padding included."""
        multiple = VOCAB_MULTIPLE * tensor_parallel_size
        return -(-self.vocab // multiple) * multiple


def check_language_model(folder: str | Path, shape: Shape) -> None:
    """Raises ConfigError where config.json describes a model with another head: a chain starts from
    a language model."""
    path, values = Path(folder) / "config.json", ConfigFile.read(Path(folder) / "config.json").values
    named, prefix = values.get("architectures"), family(shape.family).HUGGING_FACE
    allowed = [f"{prefix}ForCausalLM", f"{prefix}Model"]
    if named is None or named == []:
        return
    if not isinstance(named, list) or not all(name in allowed for name in named):
        raise ConfigError(
            f"{path}: architectures = {shown(named)}: expected {allowed[0]}: a chain starts from a language model, "
            "not from a classifier or another task's model; give the model that it was made from"
        )


def family(name: str) -> ModuleType:
    """Module training/models/NAME/table.py of a family: ``read``, ``table``, ``demo`` and Hugging
    Face's names."""
    return importlib.import_module(f"training.models.{name}.table")
