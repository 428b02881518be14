"""``python launcher/run_module.py MODULE ARGUMENT...``: what ``python -m MODULE`` does, with our
packages.

``python -m`` looks into the current folder first (``-P`` turns that off, from Python 3.11 on only),
then into PYTHONPATH: a user's own training/ or eval/ there would be taken for ours. All processes
that the launcher starts are started by this file. Standard library only, and nothing of it before
the path is settled: this folder has files named like the library's (secrets, profile).
"""

import os
import sys

PACKAGES = ("launcher", "training", "conversion", "eval")
FILE = os.path.abspath(__file__)
ROOT = os.path.dirname(os.path.dirname(FILE))


def command(module: str, *arguments: str, options: tuple[str, ...] = ()) -> list[str]:
    """Command line of a module of ours, with this interpreter; ``options`` are the
    interpreter's."""
    return [sys.executable, *options, FILE, module, *arguments]


def settled(path: list[str], first: str) -> list[str]:
    """sys.path without its entry ``first`` (the current folder, or this file's), with our packages
    found before any of the same name."""
    rest = [entry for at, entry in enumerate(path) if at or not _same(entry, first)] if first else path
    others = [entry for entry in rest if not _same(entry, ROOT) and _has_ours(entry)]
    rest = [entry for entry in rest if entry not in others]
    return [*([] if any(_same(entry, ROOT) for entry in rest) else [ROOT]), *rest, *others]


def settle_current_folder() -> None:
    """For ``python -m launcher``: forget the current folder, unless the project lies there."""
    try:
        here = os.getcwd()
    except OSError:  # it was removed
        here = ""
    sys.path[:] = settled(sys.path, "" if _same(here, ROOT) else here)


def _same(one: str, other: str) -> bool:
    try:
        return os.path.realpath(one or ".") == os.path.realpath(other or ".")
    except OSError:  # the current folder was removed
        return False


def _has_ours(entry: str) -> bool:
    """Whether a folder of the path has a package or module of one of our names."""
    return any(
        os.path.exists(os.path.join(entry, *end))
        for name in PACKAGES
        for end in ((name, "__init__.py"), (f"{name}.py",))
    )


def main() -> None:
    if sys.argv[1:2] in ([], ["-h"], ["--help"]):  # those of MODULE come after its name
        print(__doc__)
        sys.exit(0 if sys.argv[1:] else 64)
    sys.path[:] = settled(sys.path, os.path.dirname(FILE))
    import runpy

    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
