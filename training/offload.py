"""Frozen models that wait in host memory: on the device only while they are asked."""

from __future__ import annotations

import torch

from training import parallel
from training.model.language_model import LanguageModel


class Parked:
    """A frozen model whose weights are in host memory, pinned where there is CUDA. ``with parked as model:`` has them on the device.

    Nothing is copied back: nobody writes them. On the CPU the same copies are made, so that tests run what a GPU runs.
    """

    def __init__(self, model: LanguageModel):
        self.model, self.home = model, []
        for weight in model.parameters():
            assert not weight.requires_grad, "a model that learns can't be parked: its optimizer holds its weights"
            host = torch.empty(weight.shape, dtype=weight.dtype, pin_memory=torch.cuda.is_available()).copy_(weight.data)
            self.home.append((weight, host))
        self.__exit__()

    def __enter__(self) -> LanguageModel:
        for weight, host in self.home:
            weight.data = host.to(parallel.device(), non_blocking=True, copy=True)
        return self.model

    def __exit__(self, *_) -> None:
        for weight, host in self.home:
            weight.data = host
