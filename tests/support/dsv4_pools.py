"""Sizes of the tiny DeepSeek-V4's servers on a GPU, and of what they are asked."""

from __future__ import annotations

from dsv4_model import PAGE_TOKENS

VIRTUAL_PAGES, DEVICE_PAGES, FEW_PAGES = 2048, 320, 96
CHUNK = 8192
"""A chunk of so many tokens is scored over gathered keys, a shorter one over pages."""
LONG = 20_150
"""Tokens of a prompt of some 5,000 entries, of which the model selects 512; its 80th page begins 74 tokens later."""
PAGES = LONG // PAGE_TOKENS
