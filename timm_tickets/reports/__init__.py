"""One page about any number of run folders: what their records say, and what of it the data support."""
