"""One file a method. Adding one touches that file, one row in tests/test_contract.py and one recipe."""
