"""Models on megatron-core and their heads; a folder a family. It knows no trainer and no engine."""
