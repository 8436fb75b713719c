"""Benchmarks: stock SGLang and LSA, one after the other on the same GPU, with the same pool, model and prompts."""
