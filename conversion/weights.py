"""One table, read in both directions: which tensor of Hugging Face is which of megatron-core. Each
family's is in training/models/NAME/table.py.

megatron-core stores one key for all layers, with the layer as a first axis. Where it fuses several
of Hugging Face's tensors, their rows are woven group by group (conversion.tensors.Woven): query,
key and value by key-value head, gate and up row by row, so that every tensor-parallel rank's rows
lie together.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from conversion.tensors import Rows, Unwoven, Woven
from training.config.shape import EMBEDDING, VOCABULARY, Shape, Weight, family
from training.errors import ConfigError
from training.files.hf_folder import shown

HEADS = {"untied": "lm_head.weight", "scalar": "score.weight"}
"""Kind of head -> Hugging Face's name of its matrix. A "tied" head is the embedding and has no
tensor of its own."""


class Entry(NamedTuple):
    """One tensor: ``key`` in the Megatron checkpoint (row ``layer`` of it, if any), made of
    ``parts``: Hugging Face's names, without prefix, and shapes."""

    key: str
    parts: dict[str, tuple[int, ...]]
    layer: int | None
    weight: Weight

    @property
    def name(self) -> str:
        """Of the only part."""
        (name,) = self.parts
        return name

    @property
    def parameter(self) -> str:
        """The parameter's name in a model of one part."""
        return self.key if self.layer is None else self.key.replace("layers.", f"layers.{self.layer}.", 1)

    @property
    def vocabulary(self) -> bool:
        """Are its rows padded for tensor parallelism?"""
        return self.key in VOCABULARY

    def woven(self, tensors: dict[str, Rows]) -> Rows:
        """megatron-core's tensor from Hugging Face's."""
        parts = [tensors[name] for name in self.parts]
        return parts[0] if len(parts) == 1 else Woven.of(parts, self.weight.weave_groups)

    def unwoven(self, tensor: Rows) -> dict[str, Rows]:
        """Hugging Face's tensors from megatron-core's."""
        if len(self.parts) == 1:
            return {self.name: tensor}
        return {
            name: Unwoven.of(tensor, list(self.parts.values()), number, self.weight.weave_groups)
            for number, name in enumerate(self.parts)
        }


def entries(shape: Shape, head: str | None = None) -> Iterator[Entry]:
    """The table for a model, in the model's order. ``head``: "tied", "untied" or "scalar"; None =
    as config.json says."""
    for weight, layer, parts in shape.weights(head or head_of(shape)):
        yield Entry(weight.key if layer is None else f"decoder.layers.{weight.key}", parts, layer, weight)


def head_of(shape: Shape) -> str:
    return "tied" if shape.tied else "untied"


def embedding_name(shape: Shape) -> str:
    return next(entry.name for entry in entries(shape) if entry.key == EMBEDDING)


def stored_name(shape: Shape, name: str) -> str:
    """The name in a Hugging Face file: what is part of the transformer has its prefix."""
    return name if name.startswith(("lm_head.", "score.")) else family(shape.family).PREFIX + name


def check_names(names: Iterable[str], expected: Iterable[str], where, shape: Shape) -> None:
    """Raises ConfigError unless the tensors are exactly the table's."""
    names, expected = set(names), set(expected)
    if names != expected:
        raise ConfigError(
            f"{where} does not hold the tensors of a {shape.family} of {shape.layers} layers; "
            f"missing: {shown(sorted(expected - names)[:5], 400)}, unknown: {shown(sorted(names - expected)[:5], 400)}"
        )
