"""Attention mass, merged states, bounds of keys, and recorded queries against naive loops in float64, over shapes and
types.

What a GPU runs instead is compared with these in ``test_triton_*.py``, which run here under Triton's interpreter.
"""

from __future__ import annotations

import math
import os
import pathlib
import re
import subprocess
import sys

import pytest
import torch
from kernel_cases import DTYPES, NAN, TOLERANCE, random

from sglang_lsa.kernels.attention_mass import attention_mass
from sglang_lsa.kernels.merge_states import base_2, merge_states
from sglang_lsa.kernels.page_keys import key_bounds
from sglang_lsa.kernels.record import record

# --- attention_mass --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tokens", "q_heads", "kv_heads", "dim", "context", "page"),
    [
        pytest.param(3, 2, 2, 8, 10, 4, id="last page not full"),
        pytest.param(1, 3, 1, 80, 63, 64, id="63 tokens, head_dim 80, GQA 3"),
        pytest.param(5, 16, 2, 16, 128, 64, id="GQA 8, full pages"),
        pytest.param(1, 1, 1, 4, 1, 64, id="one token"),
        pytest.param(0, 2, 2, 8, 10, 4, id="no query"),
        pytest.param(130, 2, 1, 4, 140, 16, id="more queries than at once"),
    ],
)
def test_attention_mass(
    tokens: int, q_heads: int, kv_heads: int, dim: int, context: int, page: int, dtype: torch.dtype
) -> None:
    queries, keys = random(tokens, q_heads, dim, dtype=dtype), random(300, kv_heads, dim, dtype=dtype, seed=1)
    slots = torch.randperm(300, generator=torch.Generator().manual_seed(2))[:context]
    positions = torch.arange(context - tokens, context)
    seen = attention_mass(queries, keys, slots, positions, dim**-0.5, page)
    assert seen.shape == (tokens, q_heads, -(-context // page)) and seen.dtype == torch.float32
    for token in range(tokens):
        for head in range(q_heads):
            own = keys[slots[: positions[token] + 1], head // (q_heads // kv_heads)].double()
            share = (own @ queries[token, head].double() * dim**-0.5).softmax(0)
            by_page = [part.sum() for part in share.split(page)]
            by_page += [torch.zeros(())] * (seen.shape[2] - len(by_page))
            torch.testing.assert_close(seen[token, head].double(), torch.stack(by_page).double(), atol=1e-5, rtol=0)


def test_attention_mass_of_heads_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="do not fit keys"):
        attention_mass(random(1, 3, 4), random(8, 2, 4), torch.arange(4), torch.tensor([3]), 1.0, 4)


# --- merge_states ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("parts", [(7,), (3, 4), (1, 1, 1, 4), (0, 7), (7, 0), (0, 3, 0, 4)], ids=str)
def test_merged_parts_are_attention_over_all_keys(parts: tuple[int, ...], dtype: torch.dtype) -> None:
    """Against a softmax over all keys in float64."""
    tokens, heads, dim, keys = 5, 3, 16, 7
    logits, values = random(tokens, heads, keys).double() * 9, random(keys, heads, dim, seed=1).double()
    expected = torch.einsum("thk,khd->thd", logits.softmax(-1), values)
    out, lse = torch.zeros(tokens, heads, dim), torch.full((tokens, heads), float("-inf"))
    start = 0
    for count in parts:
        some = logits[..., start : start + count]
        part = torch.einsum("thk,khd->thd", some.softmax(-1), values[start : start + count])
        merge_states(out, lse, part.to(dtype), (some.logsumexp(-1) / math.log(2)).float())
        start += count
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=TOLERANCE[dtype] * 2)
    torch.testing.assert_close(lse.double() * math.log(2), logits.logsumexp(-1), rtol=1e-6, atol=1e-5)


def test_natural_logarithms_of_heads_as_base_2_of_tokens() -> None:
    """FlashAttention's log-sum-exps; where there were no keys they are infinite, some kernels say with which sign."""
    lse = torch.tensor([[1.0, 2.0, float("inf")], [0.0, float("-inf"), -3.0]])
    found = base_2(lse)
    assert found.is_contiguous()
    assert found.T[0].tolist() == pytest.approx([1 / math.log(2), 2 / math.log(2), float("-inf")])
    assert found.T[1].tolist() == pytest.approx([0.0, float("-inf"), -3 / math.log(2)])


@pytest.mark.parametrize(
    ("shapes", "dtype", "words"),
    [
        (((2, 3, 4), (2, 3), (2, 3, 5), (2, 3)), torch.float32, "cannot be merged"),
        (((2, 3, 4), (2, 3), (2, 3, 4), (2, 4)), torch.float32, "cannot be merged"),
        (((2, 3, 4), (3, 2), (2, 3, 4), (3, 2)), torch.float32, "cannot be merged"),
        (((2, 3, 4), (2, 3), (2, 3, 4), (2, 3)), torch.bfloat16, "keep it in float32"),
    ],
)
def test_states_that_do_not_fit_are_refused(shapes: tuple, dtype: torch.dtype, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        merge_states(*(torch.zeros(shape, dtype=dtype) for shape in shapes))


# --- page_keys -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("pages", "tokens", "heads", "dim"),
    [
        pytest.param(0, 64, 2, 8, id="0 pages"),
        pytest.param(1, 1, 1, 1, id="1 page of 1 token"),
        pytest.param(3, 63, 3, 80, id="63 tokens, head_dim 80"),
        pytest.param(5, 64, 8, 16, id="8 heads"),
    ],
)
def test_key_bounds(pages: int, tokens: int, heads: int, dim: int, dtype: torch.dtype) -> None:
    keys = random(pages, tokens, heads, dim, dtype=dtype)
    bounds = key_bounds(keys)
    assert bounds.shape == (pages, 2, heads, dim)
    assert bounds.dtype == dtype
    for page in range(pages):
        for head in range(heads):
            for d in range(dim):
                column = keys[page, :, head, d].tolist()
                assert bounds[page, :, head, d].tolist() == [min(column), max(column)]


# --- record ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=["int32", "int64"])
def test_record(dtype: torch.dtype) -> None:
    ring, source = torch.full((4, 3, 2, 5), NAN), random(4, 5)
    expected = ring.clone()
    rows, positions = [1, 3, 1, 1], [3, 8, 4, 5]
    for index, (row, position) in enumerate(zip(rows, positions, strict=True)):
        expected[row, position % 3, 1] = source[index]
    record(source, torch.tensor(rows, dtype=dtype), torch.tensor(positions, dtype=dtype), ring, 1)
    assert torch.equal(ring.nan_to_num(-77), expected.nan_to_num(-77))


# --- what a GPU runs -------------------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="test_triton_*.py run on this GPU themselves")
def test_triton_kernels_under_the_interpreter() -> None:
    files = sorted(map(str, pathlib.Path(__file__).parent.glob("test_triton_*.py")))
    command = [sys.executable, "-m", "pytest", *files, "-q", "-p", "no:cacheprovider"]
    run = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-2000:]
    counts = {word: int(count) for count, word in re.findall(r"(\d+) (passed|skipped|failed)", run.stdout)}
    assert counts["passed"] >= 170
    assert counts.pop("skipped") == run.stdout.count("CUDA graphs need a GPU") == 2
    assert counts.keys() == {"passed"}
