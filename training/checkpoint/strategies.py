"""How megatron-core plans and reads our checkpoints: its strategies for ``torch_dist``, subclassed.

Saving: megatron-core plans which rank writes what, and training/checkpoint/writer.py writes it.
Loading: ``.metadata`` is read by an allow-list (training/checkpoint/safe_unpickle.py), never by
plain pickle.
"""

from __future__ import annotations

import os
from functools import partial
from itertools import chain
from pathlib import Path

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, StateDict
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync, _split_by_size_and_type
from megatron.core.dist_checkpointing.strategies.state_dict_saver import (
    save_state_dict_async_finalize,
    save_state_dict_async_plan,
)
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreLoadPlanner,
    MCoreSavePlanner,
    TorchDistLoadShardedStrategy,
    TorchDistSaveShardedStrategy,
    _replace_sharded_keys_with_state_dict_keys,
    _replace_state_dict_keys_with_sharded_keys,
    _restore_dict_types,
    _unwrap_pyt_sharded_tensor,
    mcore_to_pyt_state_dict,
)
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult

from training.checkpoint import safe_unpickle
from training.errors import InvariantError

FORMAT = ("torch_dist", 1)
"""megatron-core's name and version of the format."""
WRITERS = 2
"""Files, and threads, of each rank and model (megatron-core's default)."""


class SafeReader(dcp.FileSystemReader):
    """Reads a checkpoint's model folder, its ``.metadata`` once and by the allow-list. Raises
    Damaged where that holds anything but tensors' descriptions."""

    def __init__(self, path: str | os.PathLike):
        super().__init__(path)
        self._metadata: Metadata | None = None

    def read_metadata(self) -> Metadata:
        if self._metadata is None:
            with open(Path(self.path) / ".metadata", "rb") as file:
                self._metadata = safe_unpickle.load(file)
            if getattr(self._metadata, "storage_meta", None) is None:
                self._metadata.storage_meta = StorageMeta()
            self._metadata.storage_meta.load_id = self.load_id
        return self._metadata


class LoadStrategy(TorchDistLoadShardedStrategy):
    """megatron-core's strategy with ``SafeReader`` wherever it constructs a reader of its own."""

    def load(self, sharded_state_dict: dict, checkpoint_dir: Path) -> StateDict:
        """The parent's method: megatron-core's tensors -> torch's, read in place, and back."""
        tensors = [tensor for tensor in nested_values(sharded_state_dict) if isinstance(tensor, ShardedTensor)]
        planner = MCoreLoadPlanner(
            shapes_validation_sharded_tensors=[tensor for tensor in tensors if not tensor.allow_shape_mismatch],
            allow_shape_mismatch_sharded_tensors={
                tensor.key: tensor for tensor in tensors if tensor.allow_shape_mismatch
            },
        )
        by_key, flat_mapping, rename_mapping = _replace_state_dict_keys_with_sharded_keys(sharded_state_dict)
        torch_tensors = mcore_to_pyt_state_dict(by_key, True)
        dcp.load_state_dict(torch_tensors, SafeReader(checkpoint_dir), planner=planner)
        loaded = {key: _unwrap_pyt_sharded_tensor(tensor) for key, tensor in torch_tensors.items()}
        loaded = _replace_sharded_keys_with_state_dict_keys(loaded, flat_mapping, rename_mapping)
        _restore_dict_types(loaded, sharded_state_dict)
        return loaded

    def load_tensors_metadata(self, checkpoint_dir: Path, metadata: Metadata | None = None) -> dict:
        return super().load_tensors_metadata(checkpoint_dir, metadata or SafeReader(checkpoint_dir).read_metadata())

    def load_sharded_metadata(self, checkpoint_dir: Path) -> dict:
        """Tensors alone: the allow-list refuses a checkpoint that lists other objects."""
        return self.load_tensors_metadata(checkpoint_dir)

    def remove_sharded_tensors(self, checkpoint_dir: str, key_prefix: str) -> None:
        raise NotImplementedError("it would read .metadata by plain pickle; published checkpoints never change")


class PlannedWriter(FileSystemWriterAsync):
    """Holds what this rank has to write, and takes the results of the threads that wrote it.

    The parent takes them from a queue in a manager process, which it spawns: that costs seconds and
    350 MB, and a kill leaves it behind.
    """

    files: list[tuple[Path, list[tuple[WriteItem, torch.Tensor]]]]
    """(path, [(item, tensor)]) of each file, once planned."""
    results: list[list[WriteResult]]
    """torch's results by file, once written."""

    def prepare_write_data(self, plan: SavePlan, planner: SavePlanner) -> None:
        self.files = []
        for items in filter(None, _split_by_size_and_type(self.thread_count, plan.items)):
            path = Path(self.checkpoint_dir, f"{plan.storage_data.prefix}{len(self.files)}.distcp")
            if objects := [item.index for item in items if item.type == WriteItemType.BYTE_IO]:
                raise InvariantError(f"{path}: objects would be pickled: {objects}")
            self.files.append((path, [(item, planner.resolve_data(item).detach()) for item in items]))

    def retrieve_write_results(self) -> list[WriteResult]:
        return list(chain.from_iterable(self.results))


class SaveStrategy(TorchDistSaveShardedStrategy):
    """megatron-core's strategy with a ``PlannedWriter``; it starts no process."""

    writer: PlannedWriter
    """Of the last save that was planned."""

    def __init__(self):
        super().__init__(*FORMAT, thread_count=WRITERS)

    def async_save(self, sharded_state_dict: dict, checkpoint_dir: Path) -> AsyncRequest:
        by_key, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded_state_dict, self.keep_only_main_replica)
        self.writer = PlannedWriter(checkpoint_dir, thread_count=self.thread_count)
        planner = MCoreSavePlanner(dedup_replicated_tensors=not self.keep_only_main_replica, flatten_state_dict=False)
        planned, *_ = save_state_dict_async_plan(mcore_to_pyt_state_dict(by_key, False), self.writer, planner=planner)
        return AsyncRequest(None, (), [partial(save_state_dict_async_finalize, *planned)])


def load(tensors: dict, folder: Path) -> StateDict:
    """Fill ``tensors``, nested dictionaries of megatron-core's sharded ones, from a checkpoint's
    model folder, in whose layout they need not be. A collective."""
    return dist_checkpointing.load(tensors, str(folder), sharded_strategy=LoadStrategy())


def plan(tensors: dict, folder: Path, validate: bool) -> tuple[PlannedWriter, list]:
    """What this rank has to write of ``tensors`` into ``folder``, and the functions to call when
    all ranks have written: rank 0 writes ``.metadata``, then metadata.json.

    ``validate``: check that ranks own each element exactly once. A collective.
    """
    strategy = SaveStrategy()
    request = dist_checkpointing.save(
        tensors,
        str(folder),
        sharded_strategy=strategy,
        async_sharded_save=True,
        validate_access_integrity=validate,
    )
    return strategy.writer, request.finalize_fns
