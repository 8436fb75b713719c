"""Attention over resident sets and streamed blocks, a file for each of SGLang's backends."""
