"""Times what an indexer costs a server on this GPU: scoring the pages of long contexts, and the keys of new pages.

    python docs/results/score.py INDEXER --output docs/results/score.json

The context's tokens are random, which scoring does not depend on. One refresh is one request: queries of its recent
positions against the keys of all of its pages, as a server does it between two windows.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import statistics
import sys

import numpy as np
import torch

from sglang_lsa.config import PAGE_SIZE
from sglang_lsa.engine.observe import QueryObserver
from sglang_lsa.engine.policies import Indexer
from sglang_lsa.engine.request import Asked, Request
from sglang_lsa.indexer.model import MemoryIndexer
from sglang_lsa.kernels.page_score import to_8_bits
from sglang_lsa.memory.layout.mha import MhaLayout

TOKENS = (32_768, 131_072, 524_288)
BATCHES = (1, 16)
REPEATS = 30


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("indexer", type=pathlib.Path)
    parser.add_argument("--output", type=pathlib.Path)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("score.py: there is no GPU here", file=sys.stderr)
        return 1
    indexer = MemoryIndexer.load(args.indexer).cuda()
    rows = [measure(indexer, tokens, batch) for tokens in TOKENS for batch in BATCHES]
    result = {"gpu": torch.cuda.get_device_name(), "page_bytes": indexer.config.page_bytes, "rows": rows}
    print(json.dumps(result, indent=1))
    if args.output is not None:
        args.output.write_text(json.dumps(result, indent=1) + "\n")
    return 0


def measure(indexer: MemoryIndexer, tokens: int, batch: int) -> dict[str, float]:
    """Milliseconds of device time of ``batch`` refreshes of ``tokens`` each, and of one of them; medians."""
    config, shape = indexer.config, indexer.config.model
    pages = tokens // PAGE_SIZE
    pool = [
        torch.randn((PAGE_SIZE * 257, shape.kv_heads, shape.head_dim), dtype=torch.bfloat16, device="cuda")
        for _ in range(shape.num_hidden_layers)
    ]
    observer = QueryObserver(
        batch, config.positions, config.layers, shape.q_heads, shape.head_dim, torch.bfloat16, "cuda"
    )
    observer.buffer.normal_()
    policy = Indexer(indexer, observer, MhaLayout(pool, pool, PAGE_SIZE), pages * batch)
    policy.table.copy_(to_8_bits(torch.randn((1, *policy.table.shape[1:]), device="cuda")).expand_as(policy.table))
    requests = [Request(str(row), row, Asked("indexer", 0.135), tokens=tokens) for row in range(batch)]
    own = [np.arange(pages) + 1 + row * pages for row in range(batch)]
    fresh = np.arange(1, 129)

    def refresh() -> None:
        for request, numbers in zip(requests, own, strict=True):
            policy.score(request, numbers)

    together = timed(refresh)
    keys = timed(lambda: policy.complete(fresh, fresh))
    return {
        "tokens": tokens,
        "batch": batch,
        "milliseconds": together,
        "milliseconds_a_refresh": together / batch,
        "key_microseconds_a_page": keys * 1000 / len(fresh),
    }


def timed(work) -> float:
    """Median milliseconds on the device."""
    for _ in range(3):
        work()
    found = []
    for _ in range(REPEATS):
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        began.record()
        work()
        ended.record()
        torch.cuda.synchronize()
        found.append(began.elapsed_time(ended))
    return statistics.median(found)


if __name__ == "__main__":
    sys.exit(main())
