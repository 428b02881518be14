"""No pickle of a checkpoint may run code.

torch.distributed.checkpoint reads a folder's ``.metadata`` with plain ``pickle.load``, and would
``torch.load`` entries that it calls bytes without ``weights_only``. So we read ``.metadata`` by an
allow-list instead: the classes that describe tensors, and nothing else. Byte entries are not among
them. torch reads ``common.pt`` and the tensors themselves weights-only.

Every reader goes through ``load``: training/checkpoint/strategies.py and conversion/torch_dist.py.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterable
from pathlib import Path

import torch

from training.errors import Damaged

_ALLOWED = {
    "torch": {"Size", *(name for name in dir(torch) if isinstance(getattr(torch, name), torch.dtype))},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.planner": {"SavePlan", "TensorWriteData", "WriteItem", "WriteItemType"},
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module, name):
        if name not in _ALLOWED.get(module, ()):
            raise Damaged(
                f"it asks for {module}.{name}: no description of tensors needs that, so it is not loaded. Only use "
                "checkpoints from Hugging Face files (stage convert) or from your own runs"
            )
        return super().find_class(module, name)


def load(file):
    """``pickle.load`` for a ``.metadata``. Raises Damaged, naming the file, where that is truncated
    or holds anything but tensors' descriptions."""
    try:
        return _Unpickler(file).load()
    except Damaged as error:
        raise Damaged(f"{file.name}: {error}") from None
    except (pickle.UnpicklingError, EOFError, AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise Damaged(f"{file.name} can't be read ({type(error).__name__}: {error}): truncated or changed") from None


def check(paths: Iterable[Path]) -> None:
    """Raise Damaged, naming the file, where a ``.metadata`` or ``common.pt`` among ``paths`` holds
    more than tensors and plain values."""
    for path in paths:
        if path.name == ".metadata":
            with open(path, "rb") as file:
                load(file)
        elif path.name == "common.pt":
            try:
                torch.load(path, map_location="cpu", weights_only=True)
            except (pickle.UnpicklingError, EOFError, RuntimeError) as error:
                raise Damaged(f"{path} can't be read weights-only: {str(error).splitlines()[0]}") from None
