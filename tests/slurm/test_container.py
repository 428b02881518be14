"""Ranks of a real chain started through ``apptainer exec``. Apptainer itself can't be had here: a
script of its name keeps its command line and starts the rest, so this shows what srun starts, in
which environment, and that signals and endings pass; not a container."""

import json
import sys

from tests.support.stub_project import ROOT

STAND_IN = """#!{python}
import json, os, sys
at = sys.argv.index("convoy.sif")
inner = {{name[len("APPTAINERENV_"):]: value for name, value in os.environ.items() if name.startswith("APPTAINERENV_")}}
with open("apptainer.jsonl", "a") as file:
    file.write(json.dumps({{"options": sys.argv[1:at], "command": sys.argv[at + 1:], "inner": inner}}) + "\\n")
environment = {{**os.environ, "NCCL_DEBUG": "the image's own", **inner}}
os.execvpe(sys.argv[at + 1], sys.argv[at + 1:], environment)
"""


def test_ranks_are_started_in_the_container_with_mounts_and_our_environment(project):
    programs = project.folder / "programs"
    programs.mkdir()
    (programs / "apptainer").write_text(STAND_IN.format(python=sys.executable))
    (programs / "apptainer").chmod(0o755)
    (programs / "image-python").symlink_to(sys.executable)
    project.environment["PATH"] = f"{programs}:{project.environment['PATH']}"
    site = project.folder / "mine.toml"
    site.write_text(
        (ROOT / "slurm/clusters/dev.toml").read_text() + 'preflight = false\n[container]\nruntime = "apptainer"\n'
        f'image = "convoy.sif"\npython = "{programs}/image-python"\nmounts = ["/usr/share:/data:ro"]\n'
    )
    project.behave(sft={"say": "NCCL_DEBUG"})
    ran = project.submit("--until", "sft", "--wait", profile=str(site))
    assert ran.returncode == 0, ran.stdout + ran.stderr
    started = [json.loads(line) for line in (project.folder / "apptainer.jsonl").read_text().splitlines()]
    here = str(project.folder)
    assert [one["options"] for one in started] == [
        ["exec", "--no-home", "--bind", f"{here}:{here}", "--bind", "/usr/share:/data:ro", "--pwd", here]
    ] * 3
    # it lies in the working directory, which the container sees
    runner = f"{here}/launcher/run_module.py"
    assert started[1]["command"][:4] == [f"{programs}/image-python", "-u", runner, "training.sft"]
    assert "NCCL_DEBUG is WARN" in project.log("sft"), "our variables win over the image's own"
    assert [project.json(f"sft/rank_{rank}.json")["RANK"] for rank in (0, 1)] == ["0", "1"]
