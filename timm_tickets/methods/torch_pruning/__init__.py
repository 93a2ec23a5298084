"""torch-pruning's criteria and regularisers, on the groups that this package finds; the library is an extra."""
