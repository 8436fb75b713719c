"""Memory of DeepSeek-V4: what SGLang's budget means in pages, and what virtual pages take of the device beside them."""

from __future__ import annotations

from collections.abc import Mapping

from sglang_lsa.config import LSAConfig
from sglang_lsa.engine import native_index
from sglang_lsa.engine.native_index import NativeIndex
from sglang_lsa.engine.policies import needed
from sglang_lsa.engine.sizing import Needs
from sglang_lsa.memory.layout.dsv4 import INDEX_ROW, KV_ROW, PAGE_TOKENS

C128_ROW = 1_728
"""Bytes of a page's entries in a layer that keeps one for 128 tokens: 2 of 584, filled up to a multiple of 576."""
MAP_BYTES = 8
"""Of a token, in SGLang's map from slots to slots of the sliding window."""
ENTRY, INDEX_ENTRY = 584, 132
"""Bytes of an entry and of its index key, as SGLang's budget counts them."""
VIRTUAL_SHARE = 1 / 3
"""Part of the device's budget for what is kept of every virtual page, where the mirror's size is left to us. With the
default budget resident sets fill the rest at about the same time as the mirror is full."""


def budgeted_tokens(stock_tokens: int, c4_layers: int, c128_layers: int) -> int:
    """Tokens, in whole pages of :class:`~sglang_lsa.memory.layout.dsv4.Dsv4Layout`, that the bytes hold which SGLang
    would give to entries and index keys.

    Args:
        stock_tokens: that SGLang would take; its sliding window and compression states stay what they are then.
        c4_layers, c128_layers: layers that keep an entry for 4, and for 128 tokens.
    """
    bytes_ = stock_tokens * (ENTRY + INDEX_ENTRY) * c4_layers // 4 + stock_tokens * ENTRY * c128_layers // 128
    return bytes_ // (c4_layers * (KV_ROW + INDEX_ROW)) * PAGE_TOKENS


def beside(c128_layers: int) -> dict[str, int]:
    """Device bytes that SGLang keeps of one virtual page, by name."""
    return {"c128_kv": c128_layers * C128_ROW, "swa_map": PAGE_TOKENS * MAP_BYTES}


def beside_bytes(c128_layers: int, virtual_pages: int) -> Mapping[str, int]:
    """The same of all of them, and of the padding page."""
    return {name: size * (virtual_pages + 1) for name, size in beside(c128_layers).items()}


def dsv4_needs(config: LSAConfig, index: NativeIndex, *, rows: int, context_tokens: int, c128_layers: int) -> Needs:
    """What LSA's own buffers, and what SGLang keeps of virtual pages, are made of.

    Args:
        rows: requests that run at the same time, and one for padding.
        context_tokens: longest context that SGLang's table has room for.
    """
    fixed = {policy.name: size for policy in needed(config, index=True) if (size := policy.fixed_bytes(config, index))}
    own = {policy.name: size for policy in needed(config, index=True) if (size := policy.page_bytes(config))}
    return Needs(
        rows,
        graph_batches=(),
        context_tokens=context_tokens,
        page=PAGE_TOKENS,
        page_key_bytes=native_index.page_bytes(config, index),
        row_bytes=native_index.row_bytes(config, index),
        policy_bytes={**own, **beside(c128_layers)},
        virtual_share=VIRTUAL_SHARE,
        fixed_bytes=fixed,
    )
