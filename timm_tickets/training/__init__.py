"""The trainer of recipes: one run under Accelerate, its checkpoints and checks."""
