"""A user's own training/, eval/ or secrets.py where the command is typed, or on PYTHONPATH, are not
ours."""

import os
import subprocess
import sys

import pytest

from launcher import run_module
from tests.support.stub_project import ROOT, Project

TRAP = "raise SystemExit('the user\\'s own package was imported')\n"


@pytest.fixture
def crowded(tmp_path):
    """A folder with packages of our names, and modules named like the library's and like what we
    import."""
    for package in ("training", "training/data", "conversion", "eval", "click"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text(TRAP)
    for module in ("secrets", "profile", "tomllib", "rich"):
        (tmp_path / f"{module}.py").write_text(TRAP)
    return tmp_path


def run(command, folder, **environ):
    return subprocess.run(
        command, cwd=folder, env={**os.environ, **environ}, capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize("environ", [{}, {"PYTHONPATH": "."}, {"PYTHONPATH": f".:{ROOT}"}, {"PYTHONSAFEPATH": "1"}])
def test_children_are_ours_wherever_they_are_started(crowded, environ):
    (crowded / "launcher").mkdir()
    (crowded / "launcher/__init__.py").write_text(TRAP)
    if "PYTHONPATH" in environ:  # the library's and click are then the user's own wish
        for name in ("secrets.py", "profile.py", "tomllib.py", "rich.py", "click/__init__.py"):
            (crowded / name).unlink()
    done = run(run_module.command("launcher", "--help"), crowded, **environ)
    assert done.returncode == 0 and done.stdout.startswith("Usage:"), done.stdout + done.stderr
    done = run(run_module.command("training.data.prepare"), crowded, **environ)
    assert done.returncode == os.EX_USAGE and "usage" in done.stderr, done.stdout + done.stderr


def test_python_m_launcher_and_its_children_are_ours(crowded):
    done = run([sys.executable, "-m", "launcher", "plan", "full-pipeline", "--profile", "local"], crowded)
    assert done.returncode == 0 and "hf_to_megatron" in done.stdout, done.stdout + done.stderr


def test_a_path_is_left_as_it_is_where_nothing_is_in_the_way(tmp_path):
    assert run_module.settled(["/x", str(ROOT), "/lib"], "/x") == [str(ROOT), "/lib"]
    assert run_module.settled(["/lib", "/x"], "/x") == [str(ROOT), "/lib", "/x"], "only its first entry is Python's own"


def test_a_supervisor_that_dies_at_its_start_is_reported_with_its_last_words(tmp_path):
    project = Project(tmp_path)
    (tmp_path / "sitecustomize.py").write_text("""import os, sys
if "launcher.job.supervise" in sys.orig_argv:
    print("ImportError: libcuda.so.1 is missing", flush=True)
    os._exit(1)
""")
    project.environment["PYTHONPATH"] = f"{tmp_path}:{ROOT}"
    assert project.submit("--wait", "--until", "convert").returncode == 1
    row = project.states()["convert"]
    assert row["state"] == "failed", row
    assert row["why"].startswith(
        "its supervisor ended with exit code 1 before the stage began: ImportError: libcuda"
    ), row
    (tmp_path / "sitecustomize.py").unlink()
    assert project.convoy("resume", "demo", "--wait").returncode == 0
    assert project.states()["convert"]["state"] == "done"


def test_a_current_folder_that_was_removed_ends_in_a_line(tmp_path):
    gone = tmp_path / "gone"
    gone.mkdir()
    command = f'rmdir "{gone}" && exec "{sys.executable}" -m launcher status'
    ended = subprocess.run(
        ["bash", "-c", command],
        cwd=gone,
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert ended.returncode and "Traceback" not in ended.stderr and ended.stderr.startswith("Error: "), ended
