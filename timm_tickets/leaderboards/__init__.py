"""Leaderboards: many searches by any number of processes, and the report of them."""
