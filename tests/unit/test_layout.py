"""KV layouts: the bytes of a page are what they were, and a layout that nobody knows goes all the way."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch

from sglang_lsa.memory.layout.mha import MhaLayout
from sglang_lsa.memory.pager import Pager

# --- the bytes of a page ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("page", "dtype", "checksum"),
    [
        (16, torch.float32, "c7553c4044f1ed2aaca6c6c36fb9b5ffc255807ba720aa6acaaa21ad684e31c9"),
        (16, torch.bfloat16, "5969883f55d79014cebe7f7d7eee82733a1e0c917df392b6085d74ee31ee1ffc"),
        (64, torch.float32, "617eb191ee8a1d21cb82ca7949b93a61354f63f97e7ced01383a91ef114373b8"),
        (64, torch.bfloat16, "d8bc1df99e54ff35c501f41c59db3edcb5d5e0ffab549f10fbf55f192bd50321"),
        (256, torch.float32, "8b086d9d344e1622c8f225a1a3941f34beba3455dfe34a1a722b68ca20f359ad"),
        (256, torch.bfloat16, "6b22927503aa2aa2aa2e836e16b605bbcd408560b181eeeb4389b38887bd77c5"),
    ],
)
def test_the_mirrors_bytes_of_a_fixed_pool_are_what_they_were(page: int, dtype: torch.dtype, checksum: str) -> None:
    """Computed before there were layouts, of a mirror ``[pages, layers, 2, page, kv_heads, head_dim]``."""
    pools = torch.randn(2, 3, 6 * page, 2, 16, generator=torch.Generator().manual_seed(18)).to(dtype)
    keys, values = ([layer.clone() for layer in pool] for pool in pools)
    pager = Pager(MhaLayout(keys, values, page), 9)
    pager.ledger.allocate(range(1, 10))
    assert pager.hold("a", [7, 2, 4])
    pager.store(np.array([2, 7, 4]))
    stored = pager.mirror.pages[[2, 4, 7]].numpy().tobytes()
    assert hashlib.sha256(stored).hexdigest() == checksum
