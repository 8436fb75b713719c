"""attend: causal attention of a chunk's queries against naive loops in float64."""

from __future__ import annotations

import math

import pytest
import torch

from sglang_lsa.attention import QUERY_BLOCK, attend

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
DTYPES = [pytest.param(dtype, id=str(dtype).removeprefix("torch.")) for dtype in TOLERANCE]


def random(*shape: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def naive(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float) -> torch.Tensor:
    """Query ``i`` of ``n`` is token ``length - n + i`` and sees the tokens up to itself."""
    n, q_heads, _ = q.shape
    length, kv_heads, _ = keys.shape
    out = torch.empty(n, q_heads, values.shape[2], dtype=torch.float64)
    for head in range(q_heads):
        kv = head // (q_heads // kv_heads)
        k, v = keys[:, kv].double(), values[:, kv].double()
        for i in range(n):
            visible = length - n + i + 1
            weights = torch.softmax(k[:visible] @ q[i, head].double() * scale, dim=0)
            out[i, head] = weights @ v[:visible]
    return out


CHUNKS = [
    # new tokens, tokens in all
    pytest.param(1, 1, id="first token"),
    pytest.param(1, 200, id="decode"),
    pytest.param(7, 7, id="whole prompt"),
    pytest.param(2, 3, id="short chunk"),
    pytest.param(7, 71, id="chunk after a prefix"),
]
LONG = [
    pytest.param(QUERY_BLOCK, QUERY_BLOCK + 1, id="one block"),
    pytest.param(QUERY_BLOCK + 1, QUERY_BLOCK + 30, id="one block and one query"),
    pytest.param(2 * QUERY_BLOCK, 2 * QUERY_BLOCK + 64, id="two blocks"),
]
HEADS = [
    # kv_heads, group, head_dim
    pytest.param(2, 1, 16, id="MHA"),
    pytest.param(1, 3, 80, id="groups of 3, head_dim 80"),
    pytest.param(1, 8, 16, id="groups of 8"),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("kv_heads", "group", "dim"), HEADS)
@pytest.mark.parametrize(("n", "length"), CHUNKS)
def test_attend(n: int, length: int, kv_heads: int, group: int, dim: int, dtype: torch.dtype) -> None:
    check_attend(n, length, kv_heads, group, dim, dtype)


@pytest.mark.parametrize(("kv_heads", "group", "dim"), HEADS)
@pytest.mark.parametrize(("n", "length"), LONG)
def test_attend_in_blocks_of_queries(n: int, length: int, kv_heads: int, group: int, dim: int) -> None:
    check_attend(n, length, kv_heads, group, dim, torch.float32)


def check_attend(n: int, length: int, kv_heads: int, group: int, dim: int, dtype: torch.dtype) -> None:
    q = random(n, kv_heads * group, dim, dtype=dtype, seed=1)
    keys = random(length, kv_heads, dim, dtype=dtype, seed=2)
    values = random(length, kv_heads, dim, dtype=dtype, seed=3)
    out = attend(q, keys, values, dim**-0.5)
    assert out.shape == q.shape
    assert out.dtype == dtype
    # Beyond one block the naive loops would take long; the rows around its borders are what could be wrong.
    rows = [row for row in range(n) if n <= 16 or row % QUERY_BLOCK in (0, 1, QUERY_BLOCK - 1) or row == n - 1]
    seen = [length - n + row + 1 for row in rows]
    expected = [naive(q[[row]], keys[:end], values[:end], dim**-0.5) for row, end in zip(rows, seen, strict=True)]
    torch.testing.assert_close(out[rows].double(), torch.cat(expected), rtol=0, atol=TOLERANCE[dtype])


def test_values_of_another_width() -> None:
    q, keys = random(5, 2, 16, dtype=torch.float32, seed=1), random(12, 2, 16, dtype=torch.float32, seed=2)
    values = random(12, 2, 4, dtype=torch.float32, seed=3)
    torch.testing.assert_close(
        attend(q, keys, values, 0.25).double(), naive(q, keys, values, 0.25), rtol=0, atol=TOLERANCE[torch.float32]
    )


def test_a_cache_of_another_type_is_read_in_the_type_of_the_queries() -> None:
    q, keys = random(5, 2, 16, dtype=torch.float32, seed=1), random(12, 2, 16, dtype=torch.bfloat16, seed=2)
    values = random(12, 2, 16, dtype=torch.bfloat16, seed=3)
    out = attend(q, keys, values, 0.25)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.double(), naive(q, keys, values, 0.25), rtol=0, atol=TOLERANCE[torch.float32])


def test_the_future_cannot_be_seen() -> None:
    q, keys = random(6, 2, 16, dtype=torch.float32, seed=1), random(20, 2, 16, dtype=torch.float32, seed=2)
    values = random(20, 2, 16, dtype=torch.float32, seed=3)
    before = attend(q, keys, values, 0.25)
    keys[17], values[17] = math.pi, 1e6  # the token of query 3
    after = attend(q, keys, values, 0.25)
    assert torch.equal(before[:3], after[:3])
    assert (before[3:] != after[3:]).any(dim=-1).all()


@pytest.mark.parametrize(("n", "length"), [(5, 17), (QUERY_BLOCK + 40, QUERY_BLOCK + 100)])
def test_chunks_give_what_the_whole_prompt_gives(n: int, length: int) -> None:
    """Prefill is exact however it is cut."""
    tensors = [random(length, 2, 16, dtype=torch.float32, seed=seed) for seed in (1, 2, 3)]
    q, keys, values = tensors
    whole = attend(q, keys, values, 0.25)
    first = attend(q[: length - n], keys[: length - n], values[: length - n], 0.25)
    second = attend(q[length - n :], keys, values, 0.25)
    torch.testing.assert_close(torch.cat((first, second)), whole, rtol=0, atol=TOLERANCE[torch.float32])
