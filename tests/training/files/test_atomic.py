"""Atomic writes: the old content or the new one, and nothing in between."""

import os
import stat

import pytest

from training.files import atomic


def test_a_file_is_replaced_whole(tmp_path):
    path = tmp_path / "state.json"
    for text in ("old", "ü\n"):
        atomic.write_text(path, text)
        assert path.read_text(encoding="utf-8") == text
    assert os.listdir(tmp_path) == ["state.json"]


def test_a_block_that_fails_leaves_the_old_content(tmp_path):
    path = tmp_path / "latest"
    atomic.write_text(path, "old")
    with pytest.raises(ValueError, match="half"), atomic.replacing(path) as temporary:
        temporary.write_text("half of the n")
        raise ValueError("half")
    assert path.read_text() == "old"
    atomic.write_text(path, "new")
    assert path.read_text() == "new" and os.listdir(tmp_path) == ["latest"]


@pytest.mark.parametrize("died_at", range(3))
def test_a_crash_at_any_step_leaves_the_old_content_or_the_new(tmp_path, monkeypatch, died_at):
    """Steps: the file's fsync, the rename, the folder's fsync. Only the third comes after the new
    content."""
    path = tmp_path / "latest"
    atomic.write_text(path, "old")
    steps = 0

    def dying(function):
        def call(*arguments):
            nonlocal steps
            steps += 1
            if steps > died_at:
                raise KeyboardInterrupt
            return function(*arguments)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(atomic, "sync", dying(atomic.sync))
        patch.setattr(os, "replace", dying(os.replace))
        with pytest.raises(KeyboardInterrupt):
            atomic.write_text(path, "new")
    assert path.read_text() == ("new" if died_at == 2 else "old")


def test_a_file_gets_the_mode_that_is_given(tmp_path):
    path = tmp_path / "report.json"
    atomic.write_text(path, "a key", mode=0o600)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
