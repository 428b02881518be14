"""Ranks of an attempt that the launcher has given up for lost must not write among a newer one's
checkpoints."""

import pytest

from training.checkpoint.stage_folder import StageFolder


def aside(stage, number):
    folder = stage / "checkpoints" / f".iter_{number}"
    folder.mkdir(parents=True)
    (folder / "weights").write_text(str(number))
    return folder


def test_a_save_of_an_older_attempt_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("CONVOY_ATTEMPT", "1")
    (tmp_path / ".attempt").write_text("1\n")
    StageFolder(tmp_path).publish(aside(tmp_path, 5), 5)
    (tmp_path / ".attempt").write_text("2\n")
    with pytest.raises(OSError, match="attempt 2 of .* has begun: attempt 1 saves no more"):
        StageFolder(tmp_path).publish(aside(tmp_path, 6), 6)
    assert StageFolder(tmp_path).latest() == 5 and StageFolder(tmp_path).iterations() == [5]
    monkeypatch.delenv("CONVOY_ATTEMPT")  # started by hand, without the launcher
    StageFolder(tmp_path).publish(aside(tmp_path, 7), 7)
    assert StageFolder(tmp_path).latest() == 7
