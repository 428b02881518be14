"""What a run and a site are: TOML in, dataclasses out.

It knows no run folder and calls no command of Slurm.
"""
