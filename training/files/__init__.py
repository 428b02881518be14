"""Files: reading those that others wrote, within limits, and writing atomically.

It knows no stage and no model. Standard library only: the launcher uses it, too.
"""
