"""Made texts: what a seed yields never changes, for indexers were trained on it and results were measured with it."""
