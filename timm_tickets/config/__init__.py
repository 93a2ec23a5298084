"""Recipes: what may stand in one, and how their files are read."""
