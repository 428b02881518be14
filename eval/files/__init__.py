"""Files that the evaluation reads and appends, within limits and safe against kills. It knows no
model."""
