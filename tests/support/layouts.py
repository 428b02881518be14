"""Layouts of parallel ranks, and how a test enters one."""

from megatron.core import parallel_state, tensor_parallel

from training.config.trainers import Paths, SFTConfig

# the vocabulary is padded to 256: padding must not weigh in any softmax
VOCAB, LAYERS, ROWS, LENGTH = 200, 5, 8, 16


def settings(tensor=1, pipeline=1, virtual=1, sequence=False, **values) -> SFTConfig:
    defaults = dict(
        precision="fp32",
        tensor_parallel=tensor,
        pipeline_parallel=pipeline,
        virtual_pipeline=virtual,
        sequence_parallel=sequence,
        micro_batch_size=2,
        global_batch_size=ROWS,
        iterations=20,
        warmup_iterations=0,
        lr=1e-3,
        weight_decay=0.1,
        clip_grad=0.5,
        schedule="constant",
        adam_beta2=0.95,
    )
    return SFTConfig(paths=Paths("", "", "", "", ""), **{**defaults, **values})


def enter(tensor: int, pipeline: int, virtual: int) -> None:
    """Change this rank's groups to another layout of the same world."""
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(tensor, pipeline, virtual if virtual > 1 else None)
    tensor_parallel.model_parallel_cuda_manual_seed(1)
