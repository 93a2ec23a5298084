"""What in a model can be removed as a whole: channels and heads, found by following them through a forward pass."""
