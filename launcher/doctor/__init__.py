"""What this machine, its Slurm and its nodes have, and which profile follows from it. It knows
nothing of runs."""
