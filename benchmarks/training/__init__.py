"""What a training step, a checkpoint, a conversion and the data cost on one machine, and whether
the fast paths compute what the plain ones do."""
