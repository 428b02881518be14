"""A language model on megatron-core, its layers as a ModuleSpec: everything that does not depend on
the family.

A family has a folder of its own. training/models/NAME/table.py says what its config.json means and
which tensors it has. training/models/NAME/module.py has its ``SETTINGS`` of TransformerConfig and
its ``FeedForward``.
"""

from __future__ import annotations

import importlib
from types import ModuleType

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType, ModelType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    TransformerBlock,
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules

from training.config.shape import Shape
from training.distributed import groups
from training.models import attention_backends, linear, lora, rotary
from training.models.attention import CausalAttention, Documents
from training.models.chunked_logprobs import Columns
from training.models.heads import Output, ScalarHead
from training.models.layers import CompiledLayer
from training.models.norms import no_init, norm_class


def modules(shape: Shape) -> ModuleType:
    """Return the module.py of the model's family."""
    return importlib.import_module(f"training.models.{shape.family}.module")


def transformer_config(shape: Shape, trainer, head: str = "lm") -> TransformerConfig:
    """Return megatron-core's configuration of ``shape`` under the layout and precision of
    ``trainer`` (training.config.trainers.TrainerConfig)."""
    dtype = torch.bfloat16 if trainer.precision == "bf16" else torch.float32
    backend = attention_backends.choose(trainer.attention, groups.device().type, dtype, shape.head_dim)
    interleaved = trainer.virtual_pipeline > 1
    config = TransformerConfig(
        num_layers=shape.layers,
        hidden_size=shape.hidden,
        num_attention_heads=shape.heads,
        num_query_groups=shape.kv_heads,
        kv_channels=shape.head_dim,
        qk_layernorm=shape.qk_norm,  # else finalize_model_grads does not sum the norms' gradients over ranks
        ffn_hidden_size=shape.ffn_hidden,
        layernorm_epsilon=shape.norm_eps,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        **modules(shape).SETTINGS,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
        tensor_model_parallel_size=trainer.tensor_parallel,
        pipeline_model_parallel_size=trainer.pipeline_parallel,
        virtual_pipeline_model_parallel_size=trainer.virtual_pipeline if interleaved else None,
        pipeline_model_parallel_layout=pipeline_layout(shape, trainer, head),
        # With two stages megatron-core's default of batched messages gives the interleaved schedule
        # wrong gradients, silently.
        overlap_p2p_comm=interleaved,
        batch_p2p_comm=not interleaved,
        sequence_parallel=trainer.sequence_parallel,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        **RECOMPUTE[trainer.recompute],
        recompute_modules=["core_attn"] if backend == "sdpa" else [],  # other backends store no scores
        init_method=no_init,
        output_layer_init_method=no_init,
        use_cpu_initialization=False,
        # one denominator for the whole global batch, on every layout
        calculate_per_token_loss=True,
    )
    config.core_attention, config.alibi, config.fused = backend, shape.alibi, trainer.fused
    config.lora = lora.Lora(trainer.lora_rank, trainer.lora_alpha, trainer.seed) if trainer.lora_rank else None
    # Adapters' messages between tensor-parallel ranks are megatron-core's own, which can't be
    # compiled.
    messages = trainer.tensor_parallel > 1 and trainer.lora_rank
    config.compiled = trainer.compile and groups.device().type == "cuda" and backend != "sdpa" and not messages
    return config


RECOMPUTE = {
    "none": {},
    "selective": {"recompute_granularity": "selective"},
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
}


def pipeline_layout(shape: Shape, trainer, head: str) -> list[list[str]] | None:
    """Return the layers of each pipeline chunk, in the model's order, as megatron-core's
    ``pipeline_model_parallel_layout``; None without a pipeline."""
    if trainer.pipeline_parallel == 1:
        return None
    stages = shape.chunk_layers(trainer.pipeline_parallel, trainer.virtual_pipeline, head)
    layout = [["decoder"] * stage[vp_stage] for vp_stage in range(trainer.virtual_pipeline) for stage in stages]
    layout[0].insert(0, "embedding")
    layout[-1].append("loss")
    return layout


def block_spec(config: TransformerConfig, shape: Shape, vp_stage: int | None) -> TransformerBlockSubmodules:
    """Return the layers of one chunk. Every submodule is named, because megatron-core's defaults
    depend on whether Transformer Engine or Apex is installed."""
    norm = norm_class(config.normalization, config.fused)
    column, row = lora.linears(config.lora)
    attention = SelfAttentionSubmodules(
        linear_qkv=column,
        core_attention=CausalAttention,
        linear_proj=row,
        q_layernorm=norm if shape.qk_norm else IdentityOp,
        k_layernorm=norm if shape.qk_norm else IdentityOp,
    )
    layer = ModuleSpec(
        module=CompiledLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=ModuleSpec(
                module=SelfAttention, params={"attn_mask_type": AttnMaskType.causal}, submodules=attention
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=norm,
            mlp=modules(shape).FeedForward,
            mlp_bda=get_bias_dropout_add,
        ),
    )
    return TransformerBlockSubmodules(layer_specs=[layer] * get_num_layers_to_build(config, vp_stage), layer_norm=norm)


def documents_of(config: TransformerConfig, tokens: torch.Tensor, ids: torch.Tensor | None) -> Documents | None:
    """Return what a model's layers need to know of a batch's documents.

    ``ids`` (B, T) is the document of each token; None: each row is one document. The result is None
    where the layers need nothing.
    """
    compiled = config.compiled and tokens.size(1) % attention_backends.FLEX_BLOCK == 0
    if not compiled and ids is None:
        return None
    packed = Documents(ids, compiled)
    # compiled layers read the block mask: it must be there
    if compiled and config.core_attention == "flex":
        packed.blocks = (
            attention_backends.causal_blocks(tokens.size(1), tokens.device) if ids is None else packed.blocks
        )
    return packed


class LanguageModel(LanguageModule):
    """This pipeline stage's part of the model. Under the interleaved schedule it is one of the
    stage's chunks, number ``vp_stage``.

    ``head`` "lm" maps tokens (B, T) to training.models.heads.Output, "scalar" to (B, T) fp32.
    Stages before the last return hidden states (T, B, H). Weights are uninitialised: load them.
    """

    def __init__(self, config: TransformerConfig, shape: Shape, head: str, vp_stage: int | None = None):
        super().__init__(config=config)
        tp = self.pg_collection.tp
        self.pre_process = parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage)
        self.post_process = parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage)
        self.shape, self.head, self.vp_stage = shape, head, vp_stage
        self.model_type = ModelType.encoder_or_decoder
        self.share_embeddings_and_output_weights = head == "lm" and shape.tied
        padded = shape.padded_vocab(tp.size())
        first = tp.rank() * (padded // tp.size())
        self.columns = Columns(first, min(max(shape.sampled_vocab - first, 0), padded // tp.size()), tp)
        if self.pre_process:
            self.embedding = LanguageModelEmbedding(
                config, padded, max_sequence_length=0, position_embedding_type="none", tp_group=tp
            )
            if shape.embedding_norm:
                norm = norm_class(config.normalization, config.fused)
                self.embedding_layernorm = norm(config, config.hidden_size, config.layernorm_epsilon)
        self.decoder = TransformerBlock(
            config,
            block_spec(config, shape, vp_stage),
            pre_process=self.pre_process,
            post_process=self.post_process,
            pg_collection=self.pg_collection,
            vp_stage=vp_stage,
        )
        if self.post_process and head == "lm":
            self.output_layer = tensor_parallel.ColumnParallelLinear(
                config.hidden_size,
                padded,
                config=config,
                init_method=no_init,
                bias=False,
                skip_bias_add=False,
                gather_output=False,
                skip_weight_param_allocation=self.pre_process and shape.tied,
                tp_group=tp,
            )
        elif self.post_process:
            self.score = ScalarHead(config, tp, shape.score_bias)
        if head == "lm" and (self.pre_process or self.post_process):
            self.setup_embeddings_and_output_layer()
        if config.lora:
            lora.freeze(self)

    def set_input_tensor(self, tensor) -> None:
        """Take the hidden states of the stage before. megatron-core's schedules call this."""
        self.decoder.set_input_tensor(tensor[0] if isinstance(tensor, list) else tensor)

    def forward(self, tokens, documents=None):
        """Compute this stage's part for ``tokens`` (B, T).

        ``documents`` (B, T) int is the document of each token of a packed batch, on every stage; or
        pass the result of ``documents_of``.
        """
        packed = documents if isinstance(documents, Documents) else documents_of(self.config, tokens, documents)
        hidden = self._embed(tokens) if self.pre_process else None
        if self.pre_process and self.shape.embedding_norm:
            hidden = self.embedding_layernorm(hidden)
        if self.pre_process and self.config.lora and torch.is_grad_enabled():
            # a recomputed layer whose input requires no gradient gives its adapters none
            hidden.requires_grad_()
        angles = self._angles(tokens, packed.ids if packed else None)
        hidden = self.decoder(
            hidden_states=hidden, attention_mask=None, rotary_pos_emb=angles, packed_seq_params=packed
        )
        if not self.post_process:
            return hidden
        if self.head == "scalar":
            return self.score(hidden)
        weight = (
            self.shared_embedding_or_output_weight()
            if self.share_embeddings_and_output_weights
            else self.output_layer.weight
        )
        return Output(hidden, weight, self.columns, self.config.sequence_parallel)

    def _angles(self, tokens, documents) -> torch.Tensor | None:
        """Return the rotary embedding's angles of every token; None for a family without one."""
        shape = self.shape
        if shape.rope is None:
            return None
        positions = rotary.of_documents(documents) if documents is not None else None
        return rotary.angles(shape.rope, shape.head_dim, tokens.size(1), positions, tokens.device)

    def _embed(self, tokens):
        """Tokens (B, T) -> (T, B, H), or this rank's part under sequence parallelism."""
        if self.config.tensor_model_parallel_size == 1:
            return linear.embed(tokens, self.embedding.word_embeddings.weight)
        return self.embedding(tokens, None)

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):
        """Leave out megatron-core's ``_extra_state`` objects: they are empty here, and loading them
        would unpickle."""
        # megatron-core's LanguageModule expects an output layer; a scalar head has none.
        parent = super() if self.head == "lm" else super(LanguageModule, self)
        state = parent.sharded_state_dict(prefix, sharded_offsets, metadata)
        for name in ("embedding.word_embeddings.weight", "output_layer.weight"):
            if f"{prefix}{name}" in state:
                # vocabulary padding depends on TP
                state[f"{prefix}{name}"].allow_shape_mismatch = True
        return {key: value for key, value in state.items() if not key.endswith("_extra_state")}


class Interleaved(torch.nn.Module):
    """The model chunks of a pipeline stage under the interleaved schedule, as one module to load,
    save and initialise.

    The schedule runs the chunks, so this module has no forward pass. Its parameters' names are
    local (``chunks.1.decoder.layers.0...``); the keys in a checkpoint are the model's.
    """

    def __init__(self, config: TransformerConfig, shape: Shape, head: str):
        super().__init__()
        self.config = config
        stages = range(config.virtual_pipeline_model_parallel_size)
        self.chunks = torch.nn.ModuleList(LanguageModel(config, shape, head, vp_stage) for vp_stage in stages)

    @property
    def post_process(self) -> bool:
        return self.chunks[-1].post_process

    @property
    def score(self) -> ScalarHead:
        return self.chunks[-1].score

    def sharded_state_dict(self) -> dict:
        states = [chunk.sharded_state_dict() for chunk in self.chunks]
        return {f"chunks.{number}.{key}": value for number, state in enumerate(states) for key, value in state.items()}


def model_chunks(model) -> list[torch.nn.Module]:
    """The modules that megatron-core's schedules run: an interleaved model's chunks in order, or
    the model itself."""
    if isinstance(model, Interleaved):
        return list(model.chunks)
    return list(model) if isinstance(model, list) else [model]
