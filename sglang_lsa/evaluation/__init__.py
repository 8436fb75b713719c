"""``sglang-lsa eval``: how much of a model's answers survives, on the same prompts, by who chooses the pages."""
