"""``sglang-lsa adapt``: an indexer for a model, in one command: record, train, evaluate, and a folder with a card."""
