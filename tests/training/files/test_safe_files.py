"""Names that stand in a file, and files that others may have written."""

import os
import socket

import pytest

from training.files import safe_files
from training.files.safe_files import Unfit, within


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "../x",
        "a/../../x",
        "a/..",
        "/etc/passwd",
        "a\0b",
        "a\nb",
        "a\x1b[2Jb",
        "\u202ea",
        "x" * 2000,
        "\ud800",
        None,
        5,
        ["a"],
        {"a": 1},
    ],
)
def test_a_name_that_is_not_below_the_folder_is_refused(tmp_path, name):
    with pytest.raises(Unfit):
        within(tmp_path, name)


def test_a_link_that_leads_out_is_refused_and_one_inside_is_not(tmp_path):
    run, outside = tmp_path / "run", tmp_path / "outside"
    run.mkdir()
    outside.mkdir()
    (run / "out").symlink_to(outside)
    (run / "round").symlink_to(run / "round")
    (run / "real").mkdir()
    (run / "in").symlink_to(run / "real")
    for name in ("out/new", "out", "round"):
        with pytest.raises(Unfit, match="leads out of"):
            within(run, name)
    assert within(run, "in/new") == run / "in/new"
    (tmp_path / "alias").symlink_to(run)
    assert within(tmp_path / "alias", "real/x") == tmp_path / "alias/real/x", "the run's folder itself may be a link"


def test_only_regular_files_of_a_size_are_read(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "zero").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(str(tmp_path / "socket"))
    (tmp_path / "large").write_bytes(b"0" * 1000)
    for name in ("fifo", "zero", "socket", ".", "large"):
        with pytest.raises(Unfit):
            safe_files.read_bytes(tmp_path / name, 999)
    with pytest.raises(FileNotFoundError):
        safe_files.read_bytes(tmp_path / "absent")
    assert safe_files.read_tail(tmp_path / "large", 10) == (b"0" * 10, False)
    assert safe_files.read_tail(tmp_path / "large", 1000) == (b"0" * 1000, True)


@pytest.mark.parametrize(
    "text", ["", "{", "[" * 100_000, '{"a":' * 100_000, "9" * 5000, '{"a": 1' + "0" * 400 + "}", "\ufeff{}"]
)
def test_text_that_is_no_json_we_write_is_named(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(Unfit, match=f"{tmp_path}/x.json is not JSON"):
        safe_files.read_json(tmp_path / "x.json")
