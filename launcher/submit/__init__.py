"""From a command to jobs: new runs, resumed runs, sweeps, the chain without Slurm. It prints no
tables."""
