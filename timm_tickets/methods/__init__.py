"""Every pruning method, one file a paper, picked by name (`pruning.registry`); nothing else is a method's."""
