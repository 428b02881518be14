"""BLOOM (Le Scao et al. 2022) on megatron-core, its layers as a ModuleSpec."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from megatron.core import parallel_state, tensor_parallel
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType, ModelType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlock, TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from training.model.attention import AlibiAttention
from training.model.heads import ScalarHead
from training.shape import BloomShape


def _no_init(weight: torch.Tensor) -> None:
    """Weights always come from a checkpoint. (``perform_initialization=False`` would also drop the tensor-parallel
    attributes of the parameters, and gradient norms would silently be wrong.)"""


class LayerNorm(torch.nn.LayerNorm):
    """torch's layer norm, with the flag that sequence parallelism needs (megatron-core's wrapper refuses it)."""

    def __init__(self, config, hidden_size, eps=1e-5, **_):
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype, device=torch.cuda.current_device())
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel


def transformer_config(shape: BloomShape, trainer) -> TransformerConfig:
    """megatron-core's configuration of ``shape`` under a trainer's layout and precision (training.config.TrainerConfig)."""
    dtype = torch.bfloat16 if trainer.precision == "bf16" else torch.float32
    return TransformerConfig(
        num_layers=shape.layers, hidden_size=shape.hidden, num_attention_heads=shape.heads, ffn_hidden_size=4 * shape.hidden,
        layernorm_epsilon=shape.eps, add_bias_linear=True, hidden_dropout=0.0, attention_dropout=0.0,
        # The fused form of F.gelu is the tanh formula, the unfused one is not: state the formula, leave fusion off.
        activation_func=partial(F.gelu, approximate="tanh"), bias_activation_fusion=False, bias_dropout_fusion=False,
        masked_softmax_fusion=False, gradient_accumulation_fusion=False, persist_layer_norm=False,
        tensor_model_parallel_size=trainer.tensor_parallel, pipeline_model_parallel_size=trainer.pipeline_parallel,
        sequence_parallel=trainer.sequence_parallel, params_dtype=dtype, pipeline_dtype=dtype, bf16=dtype == torch.bfloat16,
        init_method=_no_init, output_layer_init_method=_no_init, use_cpu_initialization=False,
        calculate_per_token_loss=True,  # one denominator for the whole global batch, on every layout
    )


def block_spec(config: TransformerConfig) -> TransformerBlockSubmodules:
    """Every submodule is named: megatron-core's defaults depend on whether Transformer Engine or Apex happen to be installed."""
    attention = SelfAttentionSubmodules(linear_qkv=ColumnParallelLinear, core_attention=AlibiAttention, linear_proj=RowParallelLinear,
                                        q_layernorm=IdentityOp, k_layernorm=IdentityOp)
    layer = ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=LayerNorm,
            self_attention=ModuleSpec(module=SelfAttention, params={"attn_mask_type": AttnMaskType.causal}, submodules=attention),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=LayerNorm,
            mlp=ModuleSpec(module=MLP, submodules=MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)),
            mlp_bda=get_bias_dropout_add,
        ),
    )
    return TransformerBlockSubmodules(layer_specs=[layer] * get_num_layers_to_build(config), layer_norm=LayerNorm)


class Bloom(LanguageModule):
    """This pipeline stage's part of BLOOM.

    ``head`` "lm": tokens (B, T) -> logits (B, T, V / tp), columns of vocabulary padding at -inf. ``head`` "scalar": -> (B, T) fp32.
    Stages before the last return hidden states (T, B, H). Weights are uninitialised: load them.
    """

    def __init__(self, config: TransformerConfig, shape: BloomShape, head: str):
        super().__init__(config=config)
        tp = self.pg_collection.tp
        self.pre_process, self.post_process = parallel_state.is_pipeline_first_stage(), parallel_state.is_pipeline_last_stage()
        self.head, self.vp_stage = head, None
        self.model_type = ModelType.encoder_or_decoder
        self.share_embeddings_and_output_weights = head == "lm"
        padded = shape.padded_vocab(tp.size())
        self.real_columns = min(max(shape.vocab - tp.rank() * (padded // tp.size()), 0), padded // tp.size())
        if self.pre_process:
            self.embedding = LanguageModelEmbedding(config, padded, max_sequence_length=0, position_embedding_type="none", tp_group=tp)
            self.embedding_layernorm = LayerNorm(config, config.hidden_size, config.layernorm_epsilon)
        self.decoder = TransformerBlock(config, block_spec(config), pre_process=self.pre_process, post_process=self.post_process,
                                        pg_collection=self.pg_collection)
        if self.post_process and head == "lm":
            self.output_layer = tensor_parallel.ColumnParallelLinear(
                config.hidden_size, padded, config=config, init_method=_no_init, bias=False, skip_bias_add=False, gather_output=False,
                skip_weight_param_allocation=self.pre_process, tp_group=tp)
        elif self.post_process:
            self.score = ScalarHead(config, tp)
        if head == "lm" and (self.pre_process or self.post_process):
            self.setup_embeddings_and_output_layer()

    def set_input_tensor(self, tensor) -> None:
        """The hidden states of the stage before; called by megatron-core's schedules."""
        self.decoder.set_input_tensor(tensor[0] if isinstance(tensor, list) else tensor)

    def forward(self, tokens, attention_mask=None, inference_context=None):
        """``attention_mask`` (B, 1, 1, keys): True at keys nobody may see. With ``inference_context`` only the last position's logits."""
        hidden = self.embedding_layernorm(self.embedding(tokens, None)) if self.pre_process else None
        hidden = self.decoder(hidden_states=hidden, attention_mask=attention_mask, inference_context=inference_context)
        if not self.post_process:
            return hidden
        if self.head == "scalar":
            return self.score(hidden)
        if inference_context is not None:
            hidden = hidden[-1:]
        logits, _ = self.output_layer(hidden, weight=self.shared_embedding_or_output_weight())
        logits = logits.transpose(0, 1)
        if self.real_columns < logits.size(-1):
            # Out of place on the last columns only: padding rows must not take part in any softmax.
            logits = F.pad(logits[..., : self.real_columns], (0, logits.size(-1) - self.real_columns), value=float("-inf"))
        return logits

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):
        """Without megatron-core's ``_extra_state`` objects: they hold nothing here, and loading them would unpickle."""
        # megatron-core's LanguageModule takes an output layer for granted; a scalar head has none.
        parent = super() if self.head == "lm" else super(LanguageModule, self)
        state = parent.sharded_state_dict(prefix, sharded_offsets, metadata)
        if self.pre_process:
            state[f"{prefix}embedding.word_embeddings.weight"].allow_shape_mismatch = True  # vocabulary padding depends on TP
        return {key: value for key, value in state.items() if not key.endswith("_extra_state")}
