"""Files that others wrote, read within limits.

Standard library only: the launcher reads with it, too.
"""
