"""The images of a recipe: its data sets, their splits, and the part of them that a run trains on."""
