"""A method bound to a model: the runs that it asks for, the training of one, the history that is replayed."""
