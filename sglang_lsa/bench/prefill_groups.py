"""What ``sglang-lsa bench prefill`` measures: prompts and questions, with pools of KV of one size or another."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from sglang_lsa.bench.shapes import SHAPES
from sglang_lsa.bench.systems import System
from sglang_lsa.config import PAGE_SIZE
from sglang_lsa.memory.mirror import GB
from sglang_lsa.memory.pages import align_up

CHUNK = 8192
PROMPT = 131_072
LONG_PROMPT = 400_000
MEMORY, QUESTION = 262_144, 1024
"""Tokens of a memory that the radix tree has, and of a question about it."""
FILLER = 16_384
"""Tokens of the prompts that push a memory off the device."""
SPARE = CHUNK + 12 * PAGE_SIZE
"""Tokens of the pool ``full`` beside its longest prompt."""
FIXED_BYTES = 16 * GB
"""KV of the pool ``16gb``."""
PROMPTS = {"full": (PROMPT,), "quarter": (PROMPT,), "16gb": (LONG_PROMPT,)}
"""Lengths of prompts by pool, unless ``--prompts`` names others."""
DEVICES, READINGS = ("cold", "warm"), ("exact", "resident")
"""Of a question: what is on the device before it, and how it reads the memory."""


@dataclass(frozen=True)
class Group:
    """What one server measures.

    Attributes:
        name: for ``--pools``: ``full`` holds the longest prompt, ``quarter`` a quarter of the only one, ``16gb`` 16 GB.
        pool_tokens: of KV on the device.
        prompts: lengths of prompts whose prefill is timed.
        questions: whether questions about a long memory are, too.
        kv_dtype: as SGLang's ``--kv-cache-dtype`` takes it.
    """

    name: str
    pool_tokens: int
    prompts: tuple[int, ...]
    questions: bool = False
    kv_dtype: str = "auto"

    @property
    def context(self) -> int:
        """The longest text a server is asked for, and its answer."""
        return max(*self.prompts, 2 * CHUNK, MEMORY + QUESTION if self.questions else 0) + 1024

    @property
    def host_tokens(self) -> int:
        """What the mirror must hold: the longest prompt, or the memory and what pushes it off the device."""
        memory = (MEMORY + 4 * QUESTION + self.pool_tokens + FILLER) if self.questions else 0
        return max(*self.prompts, 2 * CHUNK, memory, self.pool_tokens) + 64 * PAGE_SIZE

    def of_system(self, system: System) -> Group:
        """What of it this system can do: stock needs a pool that holds the whole prompt, and reads all of a memory."""
        if system.lsa:
            return self
        fitting = tuple(tokens for tokens in self.prompts if tokens + 2 * PAGE_SIZE <= self.pool_tokens)
        return dataclasses.replace(self, prompts=fitting, questions=False)


def groups(pools: Sequence[str], prompts: Sequence[int], workloads: Sequence[str], kv_dtype: str) -> list[Group]:
    """The servers that measure these prompts (none: each pool's own) with these pools, for the 8B shape."""
    fixed = FIXED_BYTES // SHAPES["8b"].token_bytes(kv_dtype) // PAGE_SIZE * PAGE_SIZE
    found = []
    for pool in pools:
        lengths = tuple(prompts or PROMPTS[pool]) if "ttft" in workloads else ()
        if pool == "16gb":
            found.append(Group(pool, fixed, lengths, "question" in workloads, kv_dtype))
        elif pool == "full" and lengths:
            found.append(Group(pool, align_up(max(lengths), PAGE_SIZE) + SPARE, lengths, kv_dtype=kv_dtype))
        elif pool == "quarter":
            found += [Group(pool, align_up(tokens // 4, PAGE_SIZE), (tokens,), kv_dtype=kv_dtype) for tokens in lengths]
    return found
