"""Training of memory indexers from recordings; the model that they are for is never loaded."""
