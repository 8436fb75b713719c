"""Lookahead Sparse Attention for SGLang: long contexts on the GPU memory of short ones."""

from sglang_lsa.config import LSAConfig, RequestOptions
from sglang_lsa.patches.releases import NEWEST as SGLANG_VERSION

__version__ = "0.1.0"

__all__ = ["SGLANG_VERSION", "LSAConfig", "RequestOptions", "__version__"]
