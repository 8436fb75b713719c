"""The ranks of this server, by SGLang's tensor-parallel group."""

from __future__ import annotations

import functools
import logging
from datetime import timedelta

import torch
import torch.distributed as dist

from sglang_lsa.memory.ranks import FAILURE_TIMEOUT, TIMEOUT, JoinedRanks, Ranks

logger = logging.getLogger(__name__)


@functools.cache
def ranks(size: int) -> Ranks:
    """Of this process, once SGLang's groups exist. The first call is for all ranks to make together.

    SGLang's own host group is not used: what it exchanges there, and what we do, would meet if ranks ever differed.

    Args:
        size: how many there are, as SGLang says.
    """
    if size == 1:
        return Ranks()
    from sglang.srt.distributed.parallel_state import get_tp_group

    group = get_tp_group()
    host, failures = (
        dist.new_group(group.ranks, timeout=timedelta(seconds=seconds), backend="gloo")
        for seconds in (TIMEOUT, FAILURE_TIMEOUT)
    )
    joined = JoinedRanks(host, failures, group.device_group if torch.device(group.device).type == "cuda" else None)
    logger.info("LSA: rank %d of %d", joined.rank, joined.size)
    return joined
