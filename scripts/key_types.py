"""What page keys lose in fewer bits: an indexer's recall with its keys in float32, bfloat16, and 8 bits.

    python scripts/key_types.py RECORDINGS INDEXER

8 bits are e4m3 with one scale for each key.
"""

from __future__ import annotations

import argparse
import pathlib
import sys
from collections.abc import Callable

import torch

from sglang_lsa.indexer.model import MemoryIndexer
from sglang_lsa.training.data import load_recordings
from sglang_lsa.training.recall import Rules, measure, summarise
from sglang_lsa.training.settings import TrainSettings


def in_8_bits(keys: torch.Tensor) -> torch.Tensor:
    scale = keys.abs().amax(dim=-1, keepdim=True).clamp(min=1e-6) / torch.finfo(torch.float8_e4m3fn).max
    return (keys / scale).to(torch.float8_e4m3fn).float() * scale


TYPES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "float32": lambda keys: keys,
    "bfloat16": lambda keys: keys.bfloat16().float(),
    "8 bits": in_8_bits,
}


class Rounded(MemoryIndexer):
    """An indexer whose keys are rounded."""

    def keys_of_runs(self, runs: torch.Tensor) -> torch.Tensor:
        return self.rounding(super().keys_of_runs(runs))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recordings", type=pathlib.Path)
    parser.add_argument("indexer", help="folder, or name of a shipped one")
    args = parser.parse_args()
    indexer = Rounded.load(args.indexer)
    held_out = load_recordings(args.recordings, "held-out", indexer.config.heads)
    for name, rounding in TYPES.items():
        indexer.rounding = rounding
        rows = summarise(measure(held_out, indexer, Rules(TrainSettings.golden), selectors=("indexer",)))
        print(name, *(f"{row['budget']:.1%}: recall {row['recall']}, evidence {row['evidence']}" for row in rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
