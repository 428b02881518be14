"""Trainers on megatron-core."""

import warnings

from training.distributed.lazy_inductor import without_compiler, without_optimization

without_optimization()

# A dozen warnings a rank about what megatron-core calls and what is not installed, which no one who
# runs a stage can change. What matters of them, which Adam runs on what, the trainers' log says
# once.
warnings.filterwarnings("ignore", module=r"megatron|torch\.distributed")
# The same, said of megatron-core's calls on the CPU, where training/distributed/cpu_backend.py
# stands in between.
warnings.filterwarnings("ignore", message="Please use DTensor instead", category=FutureWarning)
warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf", category=UserWarning)

without_compiler()
