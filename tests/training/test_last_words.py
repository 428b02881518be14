"""The class that a stage calls its own error: by its type and number, never by its text. eval says
the same."""

import errno
import json
import subprocess
import sys
import urllib.error

import pytest
import torch
import torch.distributed as dist

from eval import error_report as of_eval
from launcher.job.outcome import REPORTED_KINDS, OutcomeKind
from training import error_report
from training.errors import ConfigError, Damaged, DataError, InvariantError

REFUSED = urllib.error.URLError(ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused"))


@pytest.mark.parametrize(
    "error, kind",
    [
        (OSError(errno.ENOSPC, "full"), OutcomeKind.DISK_FULL),
        (OSError(errno.EDQUOT, "full"), OutcomeKind.DISK_FULL),
        (OSError(errno.EFBIG, "full"), OutcomeKind.DISK_FULL),
        (OSError(errno.EIO, "io"), OutcomeKind.NODE_FAILURE),
        (OSError(errno.ESTALE, "stale"), OutcomeKind.NODE_FAILURE),
        (PermissionError(errno.EACCES, "no"), OutcomeKind.FILE_ERROR),
        (OSError(errno.EROFS, "read-only"), OutcomeKind.FILE_ERROR),
        (FileNotFoundError(errno.ENOENT, "none"), OutcomeKind.FILE_ERROR),
        (OSError(errno.ENOMEM, "no memory"), OutcomeKind.HOST_OOM),
        (MemoryError(), OutcomeKind.HOST_OOM),
        (REFUSED, OutcomeKind.BUG),
        (ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused"), OutcomeKind.BUG),
        (TimeoutError("timed out"), OutcomeKind.BUG),
        (KeyError("No space left on device"), OutcomeKind.BUG),
        (InvariantError("ratio"), OutcomeKind.BUG),
        (torch.OutOfMemoryError("CUDA out of memory"), OutcomeKind.CUDA_OOM),
    ],
)
def test_an_error_s_class(error, kind):
    for module in (error_report, of_eval):
        assert module.kind_of(error) == kind.value and REPORTED_KINDS[kind.value] is kind


@pytest.mark.parametrize("error", [RuntimeError("NCCL error"), dist.DistBackendError("x"), dist.DistNetworkError("y")])
def test_what_torch_says_in_its_text_alone_is_left_to_the_launcher(error):
    assert error_report.kind_of(error) == of_eval.kind_of(error) == ""


@pytest.mark.parametrize(
    "error, kind, code",
    [
        (ConfigError("sft.lr = -1"), OutcomeKind.BAD_CONFIG, 64),
        (DataError("rows.jsonl line 7"), OutcomeKind.BAD_DATA, 65),
        (Damaged("iter_1", "resume"), OutcomeKind.REFUSED, 65),
        (FloatingPointError("not finite"), OutcomeKind.NAN, 1),
        (PermissionError(errno.EACCES, "no"), OutcomeKind.FILE_ERROR, 73),
        (OSError(errno.ENOSPC, "full"), OutcomeKind.DISK_FULL, 74),
    ],
)
def test_words_and_exit_code(error, kind, code, tmp_path, monkeypatch):
    assert error_report.of(error) == code, "by hand nothing is written"
    monkeypatch.setenv("CONVOY_WORDS", str(tmp_path / "attempt_1.errors"))
    monkeypatch.setenv("RANK", "3")
    assert error_report.of(error) == code
    words = json.loads((tmp_path / "attempt_1.errors/rank_3.json").read_text())
    assert words["class"] == kind.value and str(error) in words["message"]
    assert (tmp_path / "attempt_1.errors/rank_3.json").stat().st_mode & 0o77 == 0, "a message may hold a key"
    assert [path.name for path in (tmp_path / "attempt_1.errors").iterdir()] == ["rank_3.json"]


def test_words_that_can_t_be_written_are_lost_without_another_error(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("CONVOY_WORDS", str(tmp_path / "file"))
    assert error_report.of(OSError(errno.ENOSPC, "full")) == 74 and of_eval.of(OSError(errno.ENOSPC, "full")) == 74


LEAVING = """
import atexit, os, signal, sys, time
from training.distributed.groups import StopRequest, ignore_requests
stop = StopRequest()
os.kill(os.getpid(), signal.SIGUSR1)
assert stop.raised
ignore_requests()
class Late:  # collected after Python has taken its handlers down
    def __del__(self, kill=os.kill, pid=os.getpid(), number=signal.SIGUSR1):
        kill(pid, number)
sys.kept = Late()
sys.exit(75)
"""


def test_a_request_that_is_repeated_while_a_rank_leaves_does_not_kill_it():
    assert subprocess.run([sys.executable, "-c", LEAVING], check=False).returncode == 75
