"""The jobs of a run, as Slurm lists them."""

ORDER = ["convert", "sft", "reward", "rlhf", "export", "mtbench"]


def jobs(queue, project) -> dict[str, list[str]]:
    """Stage -> [id, state, reason, dependency] of the newest job that carries this run's id in its
    comment."""
    identity = project.json("config.json")["run"]["id"]
    found = {}
    for line in queue("squeue", "-h", "-t", "all", "-o", "%A|%T|%r|%E|%j|%k").splitlines():
        number, state, reason, dependency, name, comment = line.split("|")
        if f"run={identity} " in comment:
            stage = comment.rpartition("stage=")[2]
            assert name == f"{identity}.{stage}"
            if stage not in found or int(number) > int(found[stage][0]):
                found[stage] = [number, state, reason, dependency]
    return found
