"""What ``sglang-lsa bench serving`` measures: prompts that are sent together, to a model with a pool of KV."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from sglang_lsa.bench.shapes import KV_BYTES, SHAPES, Shape
from sglang_lsa.config import PAGE_SIZE
from sglang_lsa.memory.mirror import GB, available_host_memory

CONTEXT = 270_000
HOST_SPARE_GB = 12
"""Host memory that is left for the server itself."""


@dataclass(frozen=True)
class Arm:
    """One measurement: ``batch`` prompts of ``context`` tokens sent at once, each asked for ``tokens``."""

    workload: str
    context: int
    batch: int
    tokens: int
    shared: int = 0
    """Tokens at the start that all prompts have in common."""

    @property
    def name(self) -> str:
        """For ``--arms``."""
        if self.workload == "shared":
            return f"shared{self.batch}"
        tokens = f"{self.context // 1000}k"
        return self.workload + tokens if self.workload != "tpot" else f"{self.batch}x{tokens}".removeprefix("1x")

    def prompts(self, vocabulary: int) -> list[list[int]]:
        """Random token ids; the same in every run.

        Single prompts and shared prefixes are the beginnings of one long text: the radix tree of either system has
        what an earlier arm prefilled, which saves most of the time that a run takes.
        """
        text = np.random.default_rng(0).integers(10, vocabulary, CONTEXT)
        if self.batch == 1:
            return [text[: self.context].tolist()]
        draw = np.random.default_rng((1, self.context, self.batch))
        own = draw.integers(10, vocabulary, (self.batch, self.context - self.shared))
        return [np.concatenate((text[: self.shared], part)).tolist() for part in own]


@dataclass(frozen=True)
class Group:
    """What one server measures: a model with a KV pool of ``pool_gb``, of all its ranks together."""

    model: str
    pool_gb: float
    arms: tuple[Arm, ...]
    kv_dtype: str = "auto"
    room: int = 0
    """Requests that the server takes at once, when that is more than those of ``arms``."""
    tp: int = 1
    """Ranks of the server."""

    @property
    def largest(self) -> int:
        """Requests that the server takes at once."""
        return max([self.room, *(arm.batch for arm in self.arms)])

    @property
    def shape(self) -> Shape:
        return SHAPES[self.model]

    @property
    def token_bytes(self) -> int:
        return self.shape.token_bytes(self.kv_dtype)

    @property
    def pool_tokens(self) -> int:
        return int(self.pool_gb * GB) // self.token_bytes // PAGE_SIZE * PAGE_SIZE

    def of_kv_dtype(self, kv_dtype: str) -> Group:
        """The same pool in bytes; where as many contexts as fit are measured, as many more are sent as fit more."""
        more = KV_BYTES["auto"] // KV_BYTES[kv_dtype]
        arms = (dataclasses.replace(arm, batch=arm.batch * more) if arm.workload == "iso" else arm for arm in self.arms)
        return dataclasses.replace(self, arms=tuple(arms), kv_dtype=kv_dtype)

    def with_room(self, requests: int) -> Group:
        return dataclasses.replace(self, room=requests)

    def host_gb(self) -> float:
        """Mirror for the largest arm, as far as this machine has memory.

        Raises:
            ValueError: it has too little for a mirror of the pool.
        """
        tokens = max(arm.shared + arm.batch * (arm.context - arm.shared + arm.tokens + PAGE_SIZE) for arm in self.arms)
        return self.mirror_gb(tokens + CONTEXT // 8, "choose other --models or --workloads")

    def mirror_gb(self, tokens: int, otherwise: str) -> float:
        """Mirror for so many tokens and at least the pool, as far as this machine has memory.

        Args:
            otherwise: what else to do if it has too little.

        Raises:
            ValueError: it has too little for a mirror of the pool.
        """
        least = (self.pool_tokens + 2 * PAGE_SIZE) * self.token_bytes / GB
        wanted = max(tokens * self.token_bytes / GB, least)
        free = available_host_memory() / GB - HOST_SPARE_GB
        if free < least:
            raise ValueError(
                f"the {self.model} benchmark with {self.pool_gb:g} GB of KV needs {least + HOST_SPARE_GB:.0f} GB "
                f"of host memory, {free + HOST_SPARE_GB:.0f} GB are free: free some, or {otherwise}"
            )
        return math.ceil(min(wanted, free) * 100) / 100


def tpot(*sizes: tuple[int, int]) -> tuple[Arm, ...]:
    return tuple(Arm("tpot", context, batch, 400) for batch, context in sizes)


SINGLE = tpot((1, 1024), (1, 32_768), (1, 131_072), (1, 256_000))
SHARED = tuple(Arm("shared", 131_072 + 1024, agents, 240, shared=131_072) for agents in (8, 32))
GROUPS = (
    Group("8b", 48, (*SINGLE, *SHARED, *tpot((8, 40_000), (16, 16_000)))),
    Group("8b", 32, (Arm("iso", 60_000, 13, 640),)),
    Group("1b", 8, (*SINGLE, Arm("iso", 60_000, 26, 800))),
    Group("70b", 48, (*tpot((1, 131_072)), Arm("iso", 131_072, 3, 640))),
)
"""Pools are in GB of KV; iso arms send more prompts than either system runs at once."""
ARMS = tuple(dict.fromkeys(arm.name for group in GROUPS for arm in group.arms))


def chosen(
    models: Sequence[str], workloads: Sequence[str], arms: Sequence[str], kv_dtype: str, tp: int = 1
) -> Iterator[Group]:
    """The groups with what of them was asked for; their servers have room for all of the group, so that rows of short
    runs can be compared with those of long ones."""
    for group in GROUPS:
        left = tuple(arm for arm in group.arms if arm.workload in workloads and arm.name in arms)
        if group.model in models and left:
            room = group.of_kv_dtype(kv_dtype).largest
            yield dataclasses.replace(group, arms=left, tp=tp).of_kv_dtype(kv_dtype).with_room(room)
