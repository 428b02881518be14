"""A file is what its first bytes say; what holds no lines of JSON is named with its fix, and memory
has limits."""

from __future__ import annotations

import gzip
import os
import re
import socket
import subprocess
import sys
import tracemalloc
import zlib

import pytest

from training.data import source
from training.data.source import lines
from training.errors import DataError

ROW = b'{"prompt": "Why?"}\n'
ARRAY = b'[{"prompt": "Why?"}, {"prompt": "How?"}]'
FOREIGN = [
    (b"PAR1\x15\x04\n\x15", "a Parquet file; .*read_parquet.*rows.jsonl"),
    (b"ARROW1\0\0\xff\xff\n", "an Arrow .Feather. file; .*read_feather"),
    (b"\xff\xff\xff\xff\x10\0\0", "an Arrow stream.*from_file"),
    (b"PK\x03\x04rest", "a zip archive; unpack it: unzip -p"),
    (b"\x28\xb5\x2f\xfdrest", "compressed with zstd; unpack it: zstd"),
    (b"\xfd7zXZ\x00rest", "compressed with xz"),
    (b"BZh9rest", "compressed with bzip2"),
    (
        b"version https://git-lfs.github.com/spec/v1\n",
        "a git-LFS pointer, not the data itself; fetch it with `git lfs pull`",
    ),
    (ROW.decode().encode("utf-16"), "text in UTF-16; convert it: iconv"),
    (ROW.decode().encode("utf-16-le"), "text in UTF-16 without a mark; convert it"),
    (ROW.decode().encode("utf-16-be"), "text in UTF-16"),
    (b"<!DOCTYPE html>\n<html>", "a web page"),
    (b"\n\n  <html>", "a web page"),
    (b'\xef\xbb\xbf<?xml version="1"?>', "a web page or XML"),
    (ARRAY, "a JSON array; each row is a line of its own"),
    (b"[\n" + ROW, "a JSON array"),
    (b"\n\n" + ARRAY, "a JSON array"),
    (b'{\n  "prompt": "Why?"\n}\n', "JSON that is spread over several lines"),
    (b"prompt,response\nWhy?,So.\n", "a table .*read_csv"),
    (b'"prompt","response"\n', "a table"),
    (b"prompt\tresponse\n", "a table .*sep="),
    (b"\x80\x04\x95\n", "a pickle"),
    (gzip.compress(gzip.compress(ROW, mtime=0), mtime=0), "compressed twice"),
    (gzip.compress(b"PAR1\x15", mtime=0), "a Parquet file"),
    (bytes(257) + b"ustar\0" + bytes(300), "a tar archive|not text"),
]


@pytest.mark.parametrize(("content", "message"), FOREIGN, ids=[message for _, message in FOREIGN])
def test_another_format_is_named_with_what_to_do(tmp_path, content, message):
    for name in ("data.jsonl", "rows.jsonl.gz"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(
            DataError, match=re.escape(f"{name}: ") + f".*({message.replace('rows.jsonl', '')})"
        ) as error:
            list(lines(tmp_path / name))
        assert "\n" not in str(error.value) and "skip_bad_rows" not in str(error.value)


@pytest.mark.parametrize(
    "content", [ROW * 3, b"\xef\xbb\xbf" + ROW * 3, b"\n\n" + ROW + b" \n" + ROW * 2, ROW * 2 + ROW.rstrip()]
)
def test_lines_are_read_whatever_the_files_name(tmp_path, content):
    for name, data in (
        ("a.jsonl", content),
        ("a.gz", gzip.compress(content)),
        ("a.json", gzip.compress(content)),
        ("b.gz", content),
    ):
        (tmp_path / name).write_bytes(data)
        assert [line.strip() for _, line in lines(tmp_path / name)] == [ROW.strip()] * 3


def test_a_first_line_that_is_damaged_makes_no_table_of_the_file(tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(b'torn, "response": "x"}\n' + ROW)
    assert [number for number, _ in lines(tmp_path / "rows.jsonl")] == [1, 2]


def test_the_command_of_the_fix_makes_lines_of_an_array(tmp_path):
    (tmp_path / "rows.json").write_bytes(ARRAY)
    with pytest.raises(DataError) as error:
        list(lines(tmp_path / "rows.json"))
    command = str(error.value).partition("line of its own: ")[2].replace("python ", f"{sys.executable} ", 1)
    subprocess.run(command, shell=True, check=True)
    assert len(list(lines(tmp_path / "rows.jsonl"))) == 2


def bomb(path, piece: bytes, times: int, end: bytes = b"") -> None:
    """A .gz of ``piece`` repeated, as fast as it is compressed in parts."""
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    path.write_bytes(b"".join(packer.compress(piece) for _ in range(times)) + packer.compress(end) + packer.flush())


@pytest.mark.parametrize(
    ("piece", "message"),
    [
        (b"a" * (1 << 20), r":1: a line of more than 16 MiB"),
        (b"\n" * (1 << 20), r":10001: more than 10,000 empty lines"),
        ((ROW.rstrip() + b" " * 3000 + b"\n") * 300, r": unpacks to more than 200 times its size"),
    ],
)
def test_a_file_that_unpacks_to_a_thousand_times_its_size_is_refused_in_little_memory(tmp_path, piece, message):
    bomb(tmp_path / "rows.jsonl.gz", piece, 64)
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match=message):
            for _ in lines(tmp_path / "rows.jsonl.gz"):
                pass
        assert tracemalloc.get_traced_memory()[1] < 5 * source.MAX_LINE
    finally:
        tracemalloc.stop()


def test_what_is_no_file_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
        for path, words in (
            (tmp_path, "is a folder: name the file in it"),
            (tmp_path / "pipe", "is a pipe"),
            ("/dev/zero", "is a pipe"),
            (tmp_path / "socket", "is a pipe, a socket"),
        ):
            with pytest.raises(DataError, match=f"{path} {words}"):
                list(lines(path))
