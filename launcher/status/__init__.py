"""What a run is doing, from its files and Slurm's queue: states, tables, a live view and logs. It
changes nothing of a run, and knows nothing of how jobs are submitted or resumed."""
