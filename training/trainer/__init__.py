"""What all trainers share: set-up, a step, the loop, early stopping. It knows no algorithm."""
