"""Shapes, types and tensors for tests of Triton kernels: on a GPU, or else under Triton's interpreter.

The interpreter must be chosen before kernels are decorated (``TRITON_INTERPRET=1``), so on a machine without a GPU
the files that import this one are skipped, and ``test_kernels.py`` runs them once more in a process of its own.
Outputs hold NaN, -1 or numbers of their own before a kernel runs, so that places that it should not touch, or should
have, are seen.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from typing import Any

import pytest
import torch

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
NAN = float("nan")

if not ON_GPU and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("no GPU; test_kernels.py runs these interpreted", allow_module_level=True)

FLOATS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
"""Absolute tolerance of scores, which lie between 0 and 1."""


def named(dtypes: Sequence[torch.dtype]) -> list:
    return [pytest.param(dtype, id=str(dtype).removeprefix("torch.")) for dtype in dtypes]


DTYPES = named(list(FLOATS))
SCORE_DTYPES = DTYPES if ON_GPU else named([torch.float32, torch.float16])
"""The interpreter multiplies matrices of bfloat16 wrongly."""


def crossed(cases: Sequence[Any], *others: Sequence[Any], edges: Sequence[str]) -> list:
    """Cases with whatever else is varied: all with all on a GPU. Interpreted, which takes seconds a case, those of
    these ids with all of it, and the rest with the first of each."""
    usual = tuple(values[0] for values in others)
    return [
        pytest.param(*case.values, *(value for one in more for value in one.values), id="-".join(ids))
        for case in cases
        for more in itertools.product(*others)
        if ON_GPU or case.id in edges or more == usual
        for ids in [[str(one.id) for one in (case, *more)]]
    ]


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(DEVICE)


def ids(values: Sequence[int], dtype: torch.dtype = torch.int64) -> torch.Tensor:
    return torch.tensor(list(values), dtype=dtype, device=DEVICE)


def some(count: int, limit: int, seed: int = 0) -> list[int]:
    """``count`` different numbers from 1 to ``limit``, in no order."""
    return (1 + torch.randperm(limit, generator=torch.Generator().manual_seed(seed))[:count]).tolist()


def assert_same(seen: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal to the bit, NaN included."""
    torch.testing.assert_close(seen, expected, rtol=0, atol=0, equal_nan=True)


def places(tokens: int, length: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows and positions of tokens of several requests; every position is beyond the first round of the ring."""
    rows = [1 + index % 5 for index in range(tokens)]
    return ids(rows, dtype), ids([3 * length + index // 5 for index in range(tokens)], dtype)


needs_graphs = pytest.mark.skipif(not ON_GPU, reason="CUDA graphs need a GPU")
