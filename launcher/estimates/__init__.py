"""Memory and time on paper, pure. It asks neither a GPU nor Slurm."""
