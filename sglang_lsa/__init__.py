"""Lookahead Sparse Attention for SGLang: long contexts on the GPU memory of short ones."""

from sglang_lsa.config import LSAConfig, RequestOptions

__version__ = "0.1.0"
SGLANG_VERSION = "0.5.17"
"""The one SGLang release whose internals the hooks in ``patches/`` were written and checked against."""

__all__ = ["SGLANG_VERSION", "LSAConfig", "RequestOptions", "__version__"]
