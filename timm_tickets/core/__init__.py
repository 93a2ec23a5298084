"""Pure functions on plain dictionaries of tensors, and what every other layer needs: errors, seeds, warnings."""
