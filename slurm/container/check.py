"""python slurm/container/check.py {engine,apex,all}, from the project's root: is what is installed
here fit for an image? Exit 0 or 1.

The judgement is doctor's, so an image that passes is one that ``doctor --node`` finds nothing bad
in. Apex is not imported.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from launcher.doctor import node_findings  # noqa: E402 - the image has no launcher on its path yet
from launcher.slurm import node_probe


def problems(what: str, seen: dict) -> list[str]:
    """What stands against ``what``: Transformer Engine ("engine"), "apex", or everything that
    doctor calls bad and the absence of both."""
    failures = []
    for finding in node_findings.of_node(seen):
        part = {"Transformer Engine": "engine", "apex": "apex"}.get(finding.name, "")
        unfit = finding.level != "ok" or finding.value == "none" if part else finding.level == "bad"
        if unfit and what in ("all", part):
            failures.append(f"{finding.name}: {finding.value}: {finding.follows}")
    return failures


if __name__ == "__main__":
    against = problems(sys.argv[1], node_probe.main([]))
    print("\n".join(against) or f"{sys.argv[1]}: fit")
    sys.exit(bool(against))
