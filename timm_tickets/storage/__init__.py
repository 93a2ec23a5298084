"""Files: written whole or not at all, read only where their checksums agree."""
