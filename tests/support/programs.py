"""The modules of our packages that can be run."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = ("launcher", "training", "conversion", "eval")


def programs() -> dict[str, str]:
    """Module that can be run -> its text."""
    files = {path: path.read_text(encoding="utf-8") for package in PACKAGES for path in (ROOT / package).rglob("*.py")}
    return {
        ".".join(path.relative_to(ROOT).with_suffix("").parts): text
        for path, text in files.items()
        if any(isinstance(node, ast.If) and "__main__" in ast.unparse(node.test) for node in ast.parse(text).body)
    }
