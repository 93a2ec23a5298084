"""A model with masks: which weights may be pruned, how masks are held, learned and taken off again."""
