"""Megatron-LM's classic checkpoints, both ways: ``python -m conversion.megatron_lm read|write
...``.

For BLOOM only. Layout: ``latest_checkpointed_iteration.txt`` (a number or "release"),
``iter_0000100/`` or ``release/``, and in it one file a rank,
``mp_rank_TT[_PPP]/model_optim_rng.pt``. Two families of names: "legacy"
(language_model.encoder.layers.N..., with Megatron-DeepSpeed's word_embeddings.norm for BLOOM's
embedding layer norm) and "mcore" (decoder.layers.N...). Weights only: pickles run no code.
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
from functools import partial
from pathlib import Path

import torch

from conversion import huggingface, torch_dist, work
from conversion.command import main
from conversion.intact import Intact
from conversion.megatron_to_hf import DTYPES, find_checkpoint, write_folder
from conversion.tensors import Stored, mapped, raw, view
from conversion.weights import Entry, check_names, embedding_name, entries, head_of
from training.config.shape import EMBEDDING, Shape
from training.errors import ConfigError
from training.files import atomic, tensor_files

FILE = "model_optim_rng.pt"
MARK = "latest_checkpointed_iteration.txt"
VERSION = 3.0
"""checkpoint_version whose QKV rows are [head, (q, k, v), head_dim], as BLOOM's; before 2.0 they
are in other orders."""
FIX = (
    'Where you trust it: load it in Megatron-LM\'s environment and save {"model": state["model"], '
    '"checkpoint_version": state["checkpoint_version"]} in its place'
)
_LEGACY_TOP = {
    "word_embeddings.weight": "language_model.embedding.word_embeddings.weight",
    "word_embeddings_layernorm.weight": "language_model.embedding.word_embeddings.norm.weight",
    "word_embeddings_layernorm.bias": "language_model.embedding.word_embeddings.norm.bias",
    "ln_f.weight": "language_model.encoder.final_layernorm.weight",
    "ln_f.bias": "language_model.encoder.final_layernorm.bias",
    "lm_head.weight": "language_model.output_layer.weight",
}
_TIED_COPY = ("word_embeddings_for_head.weight", "output_layer.weight")
"""The embedding's copy on the last pipeline stage of a tied model."""
# Other spellings of the same tensors, by Megatron-LM's age and by Transformer Engine's fused layers
# -> ours.
_SPELLINGS = (
    (r"^language_model\.transformer\.", "language_model.encoder."),
    (r"\.layers\.(\d+)\.attention\.", r".layers.\1.self_attention."),
    (
        r"^language_model\.embedding\.(word_embeddings_|embedding_)?layernorm\.",
        "language_model.embedding.word_embeddings.norm.",
    ),
    (r"\.self_attention\.linear_qkv\.layer_norm_(weight|bias)$", r".input_layernorm.\1"),
    (r"\.mlp\.linear_fc1\.layer_norm_(weight|bias)$", r".pre_mlp_layernorm.\1"),
)


def name_in(entry: Entry, layer: int | None, family: str) -> str:
    """A tensor's name in a rank's file, where layers count from 0 in each pipeline stage."""
    if family == "mcore":
        return entry.key if layer is None else entry.key.replace("decoder.layers.", f"decoder.layers.{layer}.")
    if layer is None:
        return _LEGACY_TOP[entry.name]
    return f"language_model.encoder.layers.{layer}.{entry.name.split('.', 2)[2]}"


def ranks(folder: Path) -> dict[tuple[int, int], Path]:
    """(tensor rank, pipeline rank) -> file, of the iteration that the folder's mark names. Raises
    ConfigError where one is missing."""
    mark = folder / MARK
    if mark.is_file():
        text = mark.read_text(encoding="utf-8").strip()
        if text != "release" and not text.isdigit():
            raise ConfigError(f"{mark} holds {text[:40]!r}; expected an iteration or release")
        folder = folder / ("release" if text == "release" else f"iter_{int(text):07d}")
    found = {}
    for path in folder.glob(f"mp_rank_*/{FILE}"):
        match = re.fullmatch(r"mp_rank_(\d+)(?:_(\d+))?", path.parent.name)
        if match:
            found[int(match[1]), int(match[2] or 0)] = path
    if not found:
        raise ConfigError(f"{folder}: no mp_rank_*/{FILE} in it; give the folder with {MARK}, or one iteration's")
    tensor, pipeline = (1 + max(rank[axis] for rank in found) for axis in (0, 1))
    missing = [_folder(t, p, pipeline) for t in range(tensor) for p in range(pipeline) if (t, p) not in found]
    if missing:
        raise ConfigError(
            f"{folder}: {', '.join(missing)} is missing of TP {tensor} x PP {pipeline}; copy all ranks' files"
        )
    return found


def _folder(tensor_rank: int, pipeline_rank: int, pipeline: int) -> str:
    return f"mp_rank_{tensor_rank:02d}" + (f"_{pipeline_rank:03d}" if pipeline > 1 else "")


def read_rank(path: Path) -> dict[str, torch.Tensor]:
    """Tensors of one rank's file by flat name in today's spelling, memory-mapped."""
    loaded = huggingface.load_pickle(path, FIX)
    if not isinstance(loaded, dict) or "model" not in loaded:
        raise ConfigError(f"{path} is no Megatron-LM checkpoint: it has no 'model'")
    version = loaded.get("checkpoint_version", 0)
    if version < 2:
        raise ConfigError(
            f"{path}: checkpoint_version = {version}: its query, key and value rows are in an older order; load and "
            "save it once with Megatron-LM (it writes 3.0)"
        )
    flat: dict[str, torch.Tensor] = {}
    _flatten(loaded["model"], "", flat)
    return flat


def _flatten(node: dict, prefix: str, flat: dict) -> None:
    for key, value in node.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            _flatten(value, f"{name}.", flat)
        elif isinstance(value, torch.Tensor) and not name.endswith("_extra_state"):
            for pattern, spelling in _SPELLINGS:
                name = re.sub(pattern, spelling, name)
            flat[name] = value


def read(folder: str | Path, shape: Shape) -> dict[str, Stored]:
    """Tensors by Hugging Face name from any TP x PP, padding cut off. Raises ConfigError where they
    are not exactly those of ``shape``."""
    folder, head = Path(folder), head_of(shape)
    files = ranks(folder)
    tensor, pipeline = (1 + max(rank[axis] for rank in files) for axis in (0, 1))
    loaded = {rank: read_rank(path) for rank, path in files.items()}
    family = "legacy" if any(name.startswith("language_model.") for name in loaded[0, 0]) else "mcore"
    counts = [
        1
        + max((int(match[1]) for name in loaded[0, p] if (match := re.search(r"\.layers\.(\d+)\.", name))), default=-1)
        for p in range(pipeline)
    ]
    table = list(entries(shape, head))
    found: dict[str, Stored] = {}
    for entry in table:
        stage, local = _place(entry, counts)
        shards = [loaded[t, stage].pop(name_in(entry, local, family), None) for t in range(tensor)]
        if any(shard is None for shard in shards):
            continue
        parts = [Stored.of_tensor(shard) for shard in shards]
        found[entry.name] = parts[0] if entry.weight.split is None else Stored.joined(parts, entry.weight.split)
    for t in range(tensor) if head == "tied" else ():
        for name in _TIED_COPY:
            loaded[t, pipeline - 1].pop(name, None)
    unknown = sorted({name for names in loaded.values() for name in names})
    check_names([*found, *unknown], [entry.name for entry in table], folder, shape)
    for entry in table:
        stored, size = found[entry.name], entry.weight.size
        if entry.vocabulary and stored.shape[0] > size[0]:
            stored = found[entry.name] = stored.part(0, 0, size[0])
        huggingface.check_tensor(folder, entry.name, stored, size, entry.vocabulary)
    return found


def _place(entry: Entry, counts: list[int]) -> tuple[int, int | None]:
    """(pipeline stage, layer within it) of a tensor."""
    if entry.layer is None:
        return (0 if entry.key.startswith("embedding") else len(counts) - 1), None
    first = 0
    for stage, count in enumerate(counts):
        if entry.layer < first + count:
            return stage, entry.layer - first
        first += count
    return 0, entry.layer


def write(
    output: Path,
    tensors: dict[str, Stored],
    made_from: list,
    shape: Shape,
    tensor: int,
    pipeline: int,
    family: str,
    iteration: int = 0,
) -> None:
    """Write every rank's file and, last, the mark; iteration 0 is "release". Goes on where it was
    killed."""
    shape.check_layout(tensor, pipeline)
    if shape.layers % pipeline:
        raise ConfigError(
            f"pipeline_parallel = {pipeline} does not divide the model's {shape.layers} layers, which Megatron-LM wants"
        )
    tree = {
        (t, p): _rank(tensors, shape, (t, tensor), (p, pipeline), family)
        for t in range(tensor)
        for p in range(pipeline)
    }
    name = f"iter_{iteration:07d}" if iteration else "release"
    target, aside = output / name, output / f".{name}.converting"
    if target.exists():
        raise ConfigError(f"{target} is there; give another folder")
    files = {f"{_folder(t, p, pipeline)}/{FILE}": rank for (t, p), rank in tree.items()}
    sizes = {file: sum(stored.nbytes for stored in rank.values()) for file, rank in files.items()}
    record = {"from": made_from, "names": family, "files": sizes}
    scratch = min(work.THREADS, len(sizes)) * max(sizes.values())
    with work.folder(aside, record, sum(sizes.values()) + scratch):
        extra = arguments_of(shape, tensor, pipeline, iteration)
        work.write_files(
            aside, {file: partial(_write, rank, extra, family) for file, rank in files.items()}, sizes, f"write {name}"
        )
        work.clean(aside)
        work.replace(aside, target)
    atomic.write_text(output / MARK, str(iteration or "release"))


def _rank(
    tensors: dict[str, Stored], shape: Shape, tensor: tuple[int, int], pipeline: tuple[int, int], family: str
) -> dict[str, Stored]:
    """Flat name -> this rank's shard; ``tensor`` and ``pipeline`` are (rank, size)."""
    head, per = head_of(shape), shape.layers // pipeline[1]
    first, last = pipeline[0] == 0, pipeline[0] == pipeline[1] - 1
    found = {}
    for entry in entries(shape, head):
        here = (
            entry.layer // per == pipeline[0]
            if entry.layer is not None
            else first
            if entry.key.startswith("embedding")
            else last
        )
        if not here:
            continue
        local = None if entry.layer is None else entry.layer % per
        found[name_in(entry, local, family)] = _shard(entry, tensors[entry.name], shape, tensor)
    if head == "tied" and last and not first:
        embedding = next(entry for entry in entries(shape, head) if entry.key == EMBEDDING)
        found[_TIED_COPY[family == "mcore"]] = _shard(embedding, tensors[embedding.name], shape, tensor)
    return found


def _shard(entry: Entry, stored: Stored, shape: Shape, tensor: tuple[int, int]) -> Stored:
    if entry.vocabulary:
        stored = stored.padded(shape.padded_vocab(tensor[1]))
    if entry.weight.split is None:
        return stored
    length = stored.shape[entry.weight.split] // tensor[1]
    return stored.part(entry.weight.split, tensor[0] * length, length)


def arguments_of(shape: Shape, tensor: int, pipeline: int, iteration: int) -> dict:
    """What stands beside the weights: the version, and the model in Megatron-LM's own argument
    names."""
    args = {
        "num_layers": shape.layers,
        "hidden_size": shape.hidden,
        "ffn_hidden_size": 4 * shape.hidden,
        "num_attention_heads": shape.heads,
        "padded_vocab_size": shape.padded_vocab(tensor),
        "make_vocab_size_divisible_by": 128,
        "layernorm_epsilon": shape.norm_eps,
        "norm_epsilon": shape.norm_eps,
        "normalization": "LayerNorm",
        "add_bias_linear": True,
        "position_embedding_type": "alibi",
        "add_position_embedding": False,
        "untie_embeddings_and_output_weights": not shape.tied,
        "tensor_model_parallel_size": tensor,
        "pipeline_model_parallel_size": pipeline,
    }
    return {"args": argparse.Namespace(**args), "checkpoint_version": VERSION, "iteration": iteration}


def _write(shards: dict[str, Stored], extra: dict, family: str, file, count) -> None:
    """One rank's file. torch.save wants all its tensors at once: they are laid out as scratch
    files, so that memory holds none."""
    scratch = Path(f"{file.name}.scratch")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    model: dict = {}
    for number, (name, stored) in enumerate(shards.items()):
        values = _mapped(stored, scratch / str(number))
        if family == "legacy":
            _put(model, name, values)
        else:
            model[name] = values
        count(stored.nbytes)
    torch.save({**extra, "model": model}, file)
    shutil.rmtree(scratch)


def _mapped(stored: Stored, path: Path) -> torch.Tensor:
    """The tensor as pages of a file of its own."""
    with open(path, "wb") as file:
        for block in stored.blocks():
            file.write(memoryview(raw(block).numpy()))
    return view(mapped(path), stored.dtype, stored.shape, 0)


def _put(model: dict, name: str, values: torch.Tensor) -> None:
    """Into the nested dictionaries of the legacy format: its modules nest, the layers' names are
    flat below "encoder"."""
    parts = re.fullmatch(
        r"(language_model)\.(embedding)\.(word_embeddings)\.(.+)|(language_model)\.(encoder)\.(.+)|(.+)\.(weight)", name
    )
    *nested, last = [part for part in parts.groups() if part]
    nested = ".".join(nested).split(".")
    for part in nested:
        model = model.setdefault(part, {})
    model[last] = values


def run(options) -> None:
    model = Path(options.model)
    shape = Shape.read(model)
    if shape.family != "bloom":
        raise ConfigError(
            f"{model}: model_type = {shape.family!r}: Megatron-LM's classic layout is written and read for BLOOM only; "
            "conversion.hf_to_megatron and conversion.megatron_to_hf take every family"
        )
    if options.action == "read":
        tensors = read(options.source, shape)
        dtype = DTYPES[options.dtype] if options.dtype else tensors[embedding_name(shape)].dtype
        made_from = work.described(list(ranks(Path(options.source)).values()))
        write_folder(
            Path(options.output), tensors, made_from, model, shape, head_of(shape), dtype, options.max_shard_gb
        )
        return
    if options.source:
        source = find_checkpoint(Path(options.source))
        Intact(source).check()
        tensors, made_from = torch_dist.read(source, shape, head_of(shape)), work.described(sorted(source.iterdir()))
    else:
        tensors, made_from = huggingface.read(model, shape)[1], work.described(tensor_files.find(model).files)
    write(
        Path(options.output),
        tensors,
        made_from,
        shape,
        options.tensor_parallel,
        options.pipeline_parallel,
        options.names,
        options.iteration,
    )


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m conversion.megatron_lm", description=__doc__.split("\n\n")[0])
    actions = parser.add_subparsers(dest="action", required=True)
    into = actions.add_parser(
        "read", help="Megatron-LM -> Hugging Face folder (then conversion.hf_to_megatron for Convoy)"
    )
    into.add_argument("source", help=f"folder with {MARK}, or one iteration's folder")
    into.add_argument("output", help="Hugging Face folder to write")
    into.add_argument("--dtype", choices=list(DTYPES), help="default: as stored")
    into.add_argument("--max-shard-gb", type=float, default=2.0)
    out = actions.add_parser("write", help="Hugging Face folder or Convoy checkpoint -> Megatron-LM")
    out.add_argument("output", help="folder to write")
    out.add_argument("--source", help="Convoy's stage or checkpoint folder; default: the weights of --model")
    out.add_argument("--tensor-parallel", type=int, default=1)
    out.add_argument("--pipeline-parallel", type=int, default=1)
    out.add_argument("--names", choices=("legacy", "mcore"), default="legacy")
    out.add_argument("--iteration", type=int, default=0, help='default: "release"')
    for action in (into, out):
        action.add_argument(
            "--model", required=True, help="Hugging Face folder with config.json (and, to read, the tokenizer)"
        )
    return parser


if __name__ == "__main__":
    sys.exit(main(None, run, arguments(), lambda options: options))
