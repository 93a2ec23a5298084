"""Out of the package: files of a sparse model that other programs read, and how fast each of them runs."""
