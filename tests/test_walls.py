"""The walls between packages, the order of each package's wings, and the budgets of files.

Every import of every file counts, at any depth of a folder or a function.
"""

import ast
import functools
import re
import statistics
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ORDERS = {
    "launcher": "run_module config run slurm estimates checks job doctor status submit plan completion commands cli "
    "__main__",
    "training": "errors files config losses distributed error_report metrics models optim generation checkpoint data "
    "trainer rl main reward sft dpo ppo grpo",
    "eval": "errors addresses files judges config questions rendezvous error_report work_split answers judge scores report "
    "harness stage evaluation mtbench __main__",
}
"""Wings and modules of a package, the lowest first: each imports only itself and what stands before
it."""
PROGRAMS = {"eval.scores.__main__"}
"""Programs inside a wing that join modules of several wings; nothing imports them."""
OUTSIDE = {
    "launcher": {"click", "rich", "submitit", "tomli", "tomllib", "conversion.config", "eval.addresses", "eval.config"}
    | {"eval.errors", "eval.files.private", "eval.judge.key"}
    | {"training.checkpoint.checksums", "training.config", "training.errors", "training.files", "training.models"},
    "training": None,
    "conversion": {"training"},
    "eval": {"training.files.chat_template"},
}
"""What a package may import of what is not its own: launcher's list is closed, the others' is of
our packages. The launcher checks a judge's key by ``eval.judge.key``, as the stage will, and reads
its own secrets by the same ``eval.files.private``. One module renders chat templates, so that
training, rollout and evaluation can't differ: eval's one import of another package."""
LONGEST: dict[str, int] = {}
"""Files that are longer than the budget of 450 lines and must be split."""


def module(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module(path): path for package in ("launcher", *OUTSIDE) for path in sorted((ROOT / package).rglob("*.py"))}


@functools.cache
def imports(name: str) -> frozenset[str]:
    """Modules that a file imports: ours by their full names, others as they are written."""
    names = set()
    for node in ast.walk(ast.parse(FILES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: imports of ours are written in full"
            parts = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= {part if part in FILES else node.module for part in parts}
    return frozenset(names - {name})


def wing(name: str) -> str:
    """The part below the package: a folder, or a module on top; "" is the package itself."""
    return f"{name}.".split(".")[1]


def upwards(package: str) -> set[tuple[str, str]]:
    order = {part: at for at, part in enumerate(ORDERS[package].split())}
    own = [name for name in FILES if name.startswith(f"{package}.") and name not in PROGRAMS]
    unlisted = {wing(name) for name in own} - order.keys()
    assert not unlisted, f"{package}: {unlisted} have no place in the order of the wings"
    pairs = {(name, other) for name in own for other in imports(name) if other.startswith(f"{package}.")}
    return {(name, other) for name, other in pairs if order[wing(other)] > order[wing(name)]}


@pytest.mark.parametrize("package", ORDERS)
def test_a_wing_imports_only_wings_below(package):
    assert upwards(package) == set()


def test_programs_are_imported_by_nothing():
    assert not {(name, program) for name in FILES for program in PROGRAMS & imports(name)}


@pytest.mark.parametrize("name", FILES)
def test_a_package_imports_only_what_it_may(name):
    package = name.partition(".")[0]
    allowed = OUTSIDE[package]
    for other in imports(name):
        top = other.partition(".")[0]
        if top == package or top in sys.stdlib_module_names or (package != "launcher" and top not in OUTSIDE):
            continue
        ways = {other.rsplit(".", depth)[0] for depth in range(other.count(".") + 1)}
        assert ways & (allowed or set()), f"{name} imports {other}"


@pytest.mark.parametrize("name", [name for name in FILES if name.startswith("launcher")])
def test_submitit_has_one_user(name):
    used = {other for other in imports(name) if other.partition(".")[0] == "submitit"}
    assert not used or name == "launcher.slurm.script"


def test_what_the_launcher_reads_of_training_needs_no_torch():
    """Followed through all imports: the launcher runs where no torch is."""
    reached, rest = set(), [name for name in FILES if name.startswith("launcher")]
    while rest:
        name = rest.pop()
        if name not in reached:
            reached.add(name)
            parents = {".".join(name.split(".")[:depth]) for depth in range(1, name.count(".") + 1)}
            rest += [other for other in (imports(name) | parents) & FILES.keys()]
    heavy = {"torch", "megatron", "transformers", "tokenizers", "numpy", "safetensors", "pyarrow"}
    # a trainer's start, by training/__init__.py: torch inside a function
    late = {"training.distributed.lazy_inductor"}
    heavier = {(name, other) for name in reached - late for other in imports(name) if other.partition(".")[0] in heavy}
    assert heavier == set()


def test_a_script_for_nodes_imports_nothing_of_ours():
    """doctor --node sends it through srun's standard input; preflight's runs before anything
    else."""
    for name in ("launcher.slurm.node_probe", "launcher.job.node_check"):
        assert not {other for other in imports(name) if other.partition(".")[0] in OUTSIDE}


def test_files_fit_in_the_head():
    folders = ("launcher", "training", "conversion", "eval", "benchmarks")
    lines = {
        str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines())
        for folder in folders
        for path in (ROOT / folder).rglob("*.py")
    }
    assert statistics.median(lines.values()) < 180
    assert {path: count for path, count in lines.items() if count > LONGEST.get(path, 450)} == {}
    assert [path for path in LONGEST if lines.get(path, 0) <= 450] == [], (
        "these keep the budget: take them off the list"
    )


def test_no_test_imports_another_test():
    """What several share lies in tests/support, so that one broken test module breaks no other."""
    tests = [path for path in (ROOT / "tests").rglob("*.py") if "support" not in path.parts]
    lines = [(path.name, line) for path in tests for line in path.read_text(encoding="utf-8").splitlines()]
    pattern = re.compile(r"\s*(from|import) tests\.(\w+\.)*test_")
    assert [(name, line) for name, line in lines if pattern.match(line)] == []


def test_no_file_of_the_launcher_compares_a_stage_s_name():
    """What is special about a stage is a field of its row in launcher/config/stages.py."""
    names = "convert|sft|reward|rlhf|grpo|dpo|export|mtbench"
    pattern = re.compile(
        rf"stage\.name (==|!=|in \(|not in \()|(==|!=) \"({names})\"|\"(mtbench|convert|export)\" (not )?in "
    )
    found = [
        (name, line)
        for name, path in FILES.items()
        if name.startswith("launcher") and name != "launcher.config.stages"
        for line in path.read_text(encoding="utf-8").splitlines()
        if pattern.search(line)
    ]
    assert found == []
