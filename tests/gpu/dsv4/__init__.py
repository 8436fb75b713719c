"""A package, of which pytest knows the first test and the last."""
