"""Does training teach what it should? Whole chains through the launcher's command line: the demo,
real pairs, and a study of SmolLM2. These scripts know the launcher, not the trainers."""
