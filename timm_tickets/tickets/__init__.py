"""Tickets: what is in one, its file, and what can be done with it."""
