"""Datasheet rates of a GPU, by the key ``gpu`` of a profile. Standard library only."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    tflops: float
    """Peak in bf16 without sparsity, Tflop/s."""
    memory_gb_s: float
    """Bandwidth of its own memory, GB/s."""
    inside_gb_s: float
    """NVLink to the other GPUs of its node, GB/s, one direction."""


GPUS = {
    "a100": Gpu(tflops=312, memory_gb_s=2039, inside_gb_s=300),
    "h100": Gpu(tflops=989, memory_gb_s=3350, inside_gb_s=450),
    "h200": Gpu(tflops=989, memory_gb_s=4800, inside_gb_s=450),
    "h800": Gpu(tflops=989, memory_gb_s=3350, inside_gb_s=200),
}
"""The SXM cards. NVIDIA's datasheets; ``[machine]`` of a profile gives the rates of another."""


def model_of(name: str) -> str:
    """The model in the driver's name for a GPU: "h800" of "NVIDIA H800", "a100" of "NVIDIA
    A100-SXM4-80GB"; "" where there is none."""
    match = re.search(r"\b([A-Z]{1,2}\d{2,4})\b", name)
    return match[1].lower() if match else ""


def rated(name: str) -> str:
    """The key of ``GPUS`` for the driver's name of a GPU. "" for others, among them cards without
    NVLink to every GPU of the node (PCIe, NVL)."""
    model = model_of(name)
    return model if model in GPUS and not re.search("PCIe|NVL", name, re.IGNORECASE) else ""
