"""Other libraries' training scripts."""
