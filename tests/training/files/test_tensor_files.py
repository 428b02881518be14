"""The weights of a folder: one set, named by its own files, behind a sound header."""

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from training.errors import ConfigError
from training.files import hf_folder, tensor_files

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def write(folder: Path, *names: str) -> None:
    for number, name in enumerate(names):
        save_file({f"t{number}": torch.ones(2)}, folder / name)


def index(folder: Path, places: dict, name: str = INDEX) -> None:
    (folder / name).write_text(json.dumps({"metadata": {}, "weight_map": places}))


def test_two_sets_are_refused_and_one_in_two_ways_is_not(tmp_path):
    write(tmp_path, "a.safetensors", SINGLE)
    index(tmp_path, {"t0": "a.safetensors"})
    with pytest.raises(
        ConfigError, match="two sets of weights: model.safetensors, which transformers loads, and the shards of"
    ):
        tensor_files.find(tmp_path)
    index(tmp_path, {"t1": SINGLE})
    assert [path.name for path in tensor_files.find(tmp_path).files] == [SINGLE]
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    assert tensor_files.find(tmp_path).notes == [
        f"{tmp_path} holds pytorch_model.bin as well as model.safetensors: nothing reads pytorch_model.bin"
    ]
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ConfigError, match="holds an adapter"):
        tensor_files.find(tmp_path)


@pytest.mark.parametrize(
    "places, message",
    [
        ({"t0": "../x.safetensors"}, "in '../x.safetensors'; expected the name of a file of the folder"),
        ({"t0": "/x.safetensors"}, "expected"),
        ({"t0": "x.bin"}, "ends with .safetensors"),
        ({"t0": 5}, "expected the name"),
        ({"t0": "x\0.safetensors"}, "expected the name"),
        ({"t0": "x\ud800.safetensors"}, "expected the name"),
        ({"t0": "x.safetensors"}, "x.safetensors is missing, .*names it"),
        ({}, "has no weight_map"),
        ([], "has no weight_map"),
        ({"t0": "a" * 300 + ".safetensors"}, "expected the name"),
    ],
)
def test_an_index_names_files_of_its_folder(tmp_path, places, message):
    write(tmp_path, "a.safetensors")
    index(tmp_path, places)
    with pytest.raises(ConfigError, match=message):
        tensor_files.find(tmp_path)


def header(path: Path, text: bytes | dict, data: int = 8, length: int | None = None) -> Path:
    text = text if isinstance(text, bytes) else json.dumps(text).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + bytes(data))
    return path


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    "text, message",
    [
        ({"a": ENTRY, "b": ENTRY}, "b begins at byte 0 of the data, expected 8: tensors overlap"),
        ({"a": ENTRY | {"data_offsets": [8, 16]}}, "a begins at byte 8 of the data, expected 0"),
        ({"a": ENTRY | {"shape": [2**40, 2**40]}}, r"a is F32 \[1099511627776, 1099511627776\] but has 8 bytes"),
        ({"a": ENTRY | {"shape": [2**70, 0]}}, "expected at most 8 whole numbers"),
        ({"a": ENTRY | {"shape": [1] * 9}}, "at most 8 whole"),
        ({"a": ENTRY | {"data_offsets": [8, 0]}}, "two whole numbers, first byte and end"),
        ({"a": ENTRY | {"dtype": None}}, "name of a type"),
        ({"a": ENTRY | {"shape": [True, 2]}}, "whole numbers"),
        ({"__metadata__": {"a": 5}, "a": ENTRY}, "__metadata__ is no table of texts"),
        (b'{"a": {"dtype": "F32"}, "a": {"dtype": "F16"}}', "'a' is there twice"),
        (b"[" * 10**5, "can't be read as JSON"),
        (b"\xff\xff", "UTF-8"),
        (b'{"a": ' + b"9" * 5000 + b"}", "can't be read as JSON"),
        (b"[]", "holds no JSON object"),
        ({"a\x1b[2J": 5}, r"a\\x1b\[2J: 5; expected"),
    ],
)
def test_a_header_is_taken_in_where_it_is_sound(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message) as refused:
        tensor_files.read_header(header(tmp_path / SINGLE, text))
    assert str(refused.value).isprintable()


def test_lengths_beyond_the_file_and_beyond_reason(tmp_path):
    for length in (0, 1, 9, 2**31, 2**63, 2**64 - 1):
        with pytest.raises(ConfigError, match="is truncated or no safetensors file"):
            tensor_files.read_header(header(tmp_path / SINGLE, {}, 0, length))
    path = header(tmp_path / SINGLE, {}, 0, 2**30)
    with open(path, "r+b") as file:
        file.truncate(2**31)
    with pytest.raises(ConfigError, match="its header has 1,073,741,824 bytes, expected at most"):
        tensor_files.read_header(path)


def test_links(tmp_path):
    """Within the folder and to the blobs of the hub's cache they are ordinary; weights may be
    elsewhere, which is said."""
    outside, folder = tmp_path / "outside", tmp_path / "models--x" / "snapshots" / "0123"
    outside.write_text("{}")
    folder.mkdir(parents=True)
    (folder / "config.json").symlink_to(outside)
    with pytest.raises(ConfigError, match=f"config.json is a link to {outside}, outside the folder"):
        hf_folder.json_object(folder, "config.json")
    blobs = tmp_path / "models--x" / "blobs"
    blobs.mkdir()
    (blobs / "1").write_text('{"a": 1}')
    for target in ("../../blobs/1", "other.json"):
        (folder / "config.json").unlink()
        (folder / "config.json").symlink_to(target)
        (folder / "other.json").write_text('{"a": 1}')
        assert hf_folder.json_object(folder, "config.json") == {"a": 1}
    blobs.rename(tmp_path / "secrets")
    blobs.symlink_to(tmp_path / "secrets")
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to("../../blobs/1")
    with pytest.raises(ConfigError, match="outside the folder"):
        hf_folder.json_object(folder, "config.json")
    save_file({"a": torch.ones(1)}, tmp_path / "weights")
    (folder / SINGLE).symlink_to(tmp_path / "weights")
    assert tensor_files.find(folder).notes == [f"{folder / SINGLE} is a link to {tmp_path / 'weights'}"]
