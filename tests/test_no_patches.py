"""Production code changes no other library's globals: it subclasses, or constructs the object.

Patches are found in the syntax tree: imports of ``unittest``, ``setattr`` and ``delattr``, import
hooks, and assignments to attributes of an imported third-party module.
"""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OURS = ("launcher", "training", "conversion", "eval")
SETTINGS = ("torch._dynamo.config.",)
"""Modules of a library that exist to be assigned to: its documented settings."""
EXCUSED = {
    "training/distributed/cpu_backend.py": "megatron-core names torch.cuda throughout and takes no device; restored",
    "training/distributed/lazy_inductor.py": "megatron-core's own switch works only between two of its imports",
}
"""Files that patch, and why."""


def patches(source: str) -> list[tuple[int, str]]:
    """(line, code) of each patch in a module's ``source``."""
    tree = ast.parse(source)
    libraries = set(_imported(tree))
    return sorted((node.lineno, ast.unparse(node)) for node in ast.walk(tree) if _is_patch(node, libraries))


def _is_patch(node: ast.AST, libraries: set[str]) -> bool:
    if isinstance(node, ast.Name):
        return node.id in ("setattr", "delattr")
    if not isinstance(node, ast.Attribute):
        return _imports_unittest(node)
    name = ast.unparse(node)
    if isinstance(node.ctx, ast.Load):
        return name in ("sys.meta_path.insert", "sys.meta_path.append")
    return _root(node) in libraries and not name.startswith(SETTINGS)


def _imports_unittest(node: ast.AST) -> bool:
    if isinstance(node, ast.Import):
        return any(alias.name.startswith("unittest") for alias in node.names)
    return isinstance(node, ast.ImportFrom) and (node.module or "").startswith("unittest")


def _imported(tree: ast.Module):
    """Names that an import of a third-party library binds, at any depth."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Import | ast.ImportFrom):
            continue
        for alias in node.names:
            origin = alias.name if isinstance(node, ast.Import) else node.module
            if origin.partition(".")[0] not in (*OURS, *sys.stdlib_module_names):
                yield alias.asname or alias.name.partition(".")[0]


def _root(node: ast.AST) -> str | None:
    """``a`` of ``a.b.c``."""
    while isinstance(node, ast.Attribute):
        node = node.value
    return node.id if isinstance(node, ast.Name) else None


FILES = [str(path.relative_to(ROOT)) for package in OURS for path in sorted((ROOT / package).rglob("*.py"))]


@pytest.mark.parametrize("name", FILES)
def test_no_file_patches_a_library(name):
    if name not in EXCUSED:
        assert patches((ROOT / name).read_text(encoding="utf-8")) == []


def test_excused_files_still_patch():
    assert [name for name in EXCUSED if not patches((ROOT / name).read_text(encoding="utf-8"))] == []


@pytest.mark.parametrize(
    "source",
    [
        "from unittest import mock",
        "import unittest.mock",
        "import torch\ntorch.cuda.is_available = lambda: True",
        "from megatron.core.optimizer import distrib_optimizer\ndistrib_optimizer.HAVE_APEX_OR_TE = False",
        "def late():\n    from torch.distributed.checkpoint import filesystem as files\n    files.pickle = None",
        "import torch\nsetattr(torch.cuda, 'Stream', None)",
        "import torch\ndel torch.cuda.Stream",
        "import torch\nwith open('x') as torch.file:\n    pass",
        "import sys\nsys.meta_path.insert(0, None)",
    ],
)
def test_a_patch_is_seen(source):
    assert len(patches(source)) == 1


def test_an_object_of_ours_may_be_changed():
    assert patches("import torch\nmodel = torch.nn.Linear(1, 1)\nmodel.weight.place = 0") == []


def test_a_documented_setting_may_be_changed():
    assert patches("import torch\ntorch._dynamo.config.recompile_limit = 256") == []
