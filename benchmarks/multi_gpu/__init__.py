"""Do all layouts compute what one GPU does, and how fast? run.sh starts suite.py. plan.py says
which jobs run, rank.py is one rank of a job, checks.py and speed.py are the parts."""
