"""Every call of a Slurm command, and what its text means.

It does not know what a stage computes.
"""
