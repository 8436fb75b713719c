"""How full a server says that it is: SGLang's own observer over our allocator, with the hook around it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from sglang.srt.managers.scheduler_components.pool_stats_observer import PoolStats, SchedulerPoolStatsObserver

from sglang_lsa.config import PAGE_SIZE
from sglang_lsa.memory.layout.mha import MhaLayout
from sglang_lsa.memory.pager import Pager
from sglang_lsa.patches.scheduler_pool_stats_observer_get_pool_stats import HOOK
from sglang_lsa.radix_ext.allocator import VirtualPageAllocator

PHYSICAL, VIRTUAL = 40, 160
TOTAL = VIRTUAL * PAGE_SIZE


def stats_of(held: int, promised: int, allocated: int, hooked: bool = True) -> PoolStats:
    """Of a server whose requests have so many virtual pages and, on the device, hold and were promised so many."""
    keys, values = ([torch.zeros((PHYSICAL + 1) * PAGE_SIZE, 1, 2)] for _ in range(2))
    pager = Pager(MhaLayout(keys, values, PAGE_SIZE), VIRTUAL)
    pool: Any = SimpleNamespace()
    allocator = VirtualPageAllocator(TOTAL, PAGE_SIZE, torch.float32, "cpu", pool, pager)
    assert allocator.alloc(allocated * PAGE_SIZE) is not None
    assert pager.hold("a", np.arange(1, held + 1))
    pager.reservations.promise("b", promised)
    others = dict.fromkeys(SchedulerPoolStatsObserver.__dataclass_fields__)
    tree = SimpleNamespace(evictable_size=lambda: 0)
    observer = SchedulerPoolStatsObserver(
        **others | {"tree_cache": tree, "token_to_kv_pool_allocator": allocator, "max_total_num_tokens": TOTAL}
    )
    stats = observer.get_pool_stats()
    if hooked:
        assert HOOK.function(stats, observer) is None, "SGLang goes on with its own result"
    return stats


@pytest.mark.parametrize(
    ("held", "promised", "allocated", "share"),
    [(0, 0, 80, 0.5), (28, 0, 28, 0.7), (10, 20, 30, 0.75), (40, 20, 60, 1.0), (2, 0, 8, 0.05)],
    ids=["host", "device", "promised", "full", "equal"],
)
def test_the_larger_share_is_reported(held: int, promised: int, allocated: int, share: float) -> None:
    stats = stats_of(held, promised, allocated)
    assert stats.get_kv_token_stats() == (round(share * TOTAL), pytest.approx(share))
    assert stats.get_max_pool_usage() == pytest.approx(share)
    assert f"token usage: {share:.2f}" in " ".join(stats.get_decode_usage_msg_parts())


def test_what_sglang_adds_up_to_find_leaks_stays() -> None:
    with_hook, without = stats_of(28, 4, 40), stats_of(28, 4, 40, hooked=False)
    assert (without.full_token_usage, with_hook.full_token_usage) == (0.25, 0.8)
    for name in ("full_available_size", "full_evictable_size"):
        assert getattr(with_hook, name) == getattr(without, name)
