"""The only code that reads or writes ``runs/<name>/``. It knows no Slurm command."""
