"""The checks before anything is written or queued: configuration, inputs, weights, disk and judge.
They start nothing, and know nothing of jobs or of the commands that call them."""
