"""Lookahead Sparse Attention for SGLang: long contexts on the GPU memory of short ones."""

from sglang_lsa.config import LSAConfig, RequestOptions
from sglang_lsa.patches.releases import RELEASES

__version__ = "0.1.0"

SGLANG_VERSIONS = tuple(RELEASES)
"""Releases of SGLang that it runs with, oldest first."""

__all__ = ["SGLANG_VERSIONS", "LSAConfig", "RequestOptions", "__version__"]
