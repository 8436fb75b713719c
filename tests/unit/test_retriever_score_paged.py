"""Scores over pages of index keys: against loops in float64, against SGLang's logits; and Triton's against these."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

import pytest
import torch

from sglang_lsa.kernels.retriever_score_paged import (
    ENTRIES,
    ROW,
    _retriever_score_paged_triton,
    entry_logits,
    pack_pages,
    retriever_score_paged,
    retriever_score_paged_reference,
    unpack_pages,
)

ON_GPU = torch.cuda.is_available()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if ON_GPU else "cpu"
needs_triton = pytest.mark.skipif(not ON_GPU and not INTERPRETED, reason="no GPU; the last test runs these interpreted")


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def fp8(values: torch.Tensor) -> torch.Tensor:
    return values.to(torch.float8_e4m3fn).view(torch.uint8)


def parts(tokens: int, heads: int, n: int, rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, weights of both signs, a table, and some of its rows in no order."""
    table = pack_pages(random(rows, ENTRIES, 128, seed=2) * torch.logspace(-1, 1, ENTRIES, device=DEVICE)[:, None])
    pages = torch.randperm(rows, generator=torch.Generator().manual_seed(3))[:n].to(DEVICE)
    return random(tokens, heads, 128), random(tokens, heads, seed=1) / heads, table, pages


def test_pages_are_values_first_and_scales_last() -> None:
    keys = random(3, ENTRIES, 128)
    rows = pack_pages(keys)
    assert rows.shape == (3, ROW) == (3, 8448) and rows.dtype == torch.uint8
    scales = keys.abs().amax(dim=2) / 448
    torch.testing.assert_close(rows[:, 8192:].contiguous().view(torch.float32), scales)
    numbers, found = unpack_pages(rows)
    assert float(((numbers * found[..., None] - keys).abs() / keys.abs().amax(dim=2, keepdim=True)).max()) < 2**-4


def test_the_formula() -> None:
    queries, weights, table, pages = parts(2, 3, 2, 4)
    queries, weights = queries.double(), weights.double()
    numbers, scales = unpack_pages(table[pages], torch.float64)
    best, count = retriever_score_paged_reference(queries, weights, table, pages, 0.5)
    for token in range(2):
        for page in range(2):
            logits = [
                float(scales[page, key])
                * sum(
                    float(weights[token, head]) * max(0.0, float(queries[token, head] @ numbers[page, key]))
                    for head in range(3)
                )
                for key in range(ENTRIES)
            ]
            assert float(best[token, page]) == pytest.approx(max(logits))
            assert int(count[token, page]) == sum(logit > 0.5 for logit in logits)


@pytest.mark.parametrize("heads", [64, 128])
def test_logits_are_those_of_sglang(heads: int) -> None:
    """SGLang rounds products to bfloat16, so that its logits are a little apart."""
    indexer = pytest.importorskip("sglang.srt.layers.attention.dsv4.indexer")
    queries, weights, table, pages = parts(3, heads, 5, 9)
    queries = queries.to(torch.float8_e4m3fn)
    theirs = indexer.fp8_paged_mqa_logits_torch(
        queries[:, None],
        table.view(len(table), ENTRIES, 1, 132),
        weights,
        torch.full((3,), 5 * ENTRIES, device=DEVICE),
        pages.expand(3, -1),
        None,
        5 * ENTRIES,
        clean_logits=False,
    ).view(3, 5, ENTRIES)
    ours = entry_logits(queries.view(torch.uint8), weights, table[pages])
    close = float(theirs.abs().max()) * 2**-8
    torch.testing.assert_close(ours, theirs.float(), rtol=2**-6, atol=close)
    best, _ = retriever_score_paged(queries.view(torch.uint8), weights, table, pages)
    torch.testing.assert_close(best, theirs.float().amax(dim=2), rtol=2**-6, atol=close)


def test_many_pages_are_scored_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = parts(2, 4, 9, 12)
    whole = retriever_score_paged_reference(*arguments)
    monkeypatch.setattr("sglang_lsa.kernels.retriever_score_paged.PAGES_AT_ONCE", 4)
    torch.testing.assert_close(retriever_score_paged_reference(*arguments), whole)


@pytest.mark.parametrize(("tokens", "n"), [(0, 3), (2, 0)])
def test_nothing_to_score(tokens: int, n: int) -> None:
    best, count = retriever_score_paged(*parts(tokens, 4, n, 3))
    assert best.shape == count.shape == (tokens, n)


def test_what_does_not_fit_is_refused() -> None:
    queries, weights, table, pages = parts(2, 4, 2, 3)
    with pytest.raises(ValueError, match=r"uint8 \[pages, 8448\]"):
        retriever_score_paged(queries, weights, table[:, :-4], pages)
    with pytest.raises(ValueError, match="do not fit each other"):
        retriever_score_paged(queries, weights[:, :3], table, pages)
    with pytest.raises(ValueError, match=r"int32: use floats, or fp8"):
        retriever_score_paged(queries.int(), weights, table, pages)


# --- what a GPU runs -------------------------------------------------------------------------------------------------

# The interpreter multiplies matrices of bfloat16 wrongly.
SHAPES = [
    # tokens, heads, pages, rows
    pytest.param(1, 64, 1, 2, id="1 token, 1 page"),
    pytest.param(3, 64, 5, 7, id="64 heads, the last program has one page"),
    pytest.param(2, 128, 4, 9, id="128 heads"),
    pytest.param(9, 3, 3, 3, id="3 heads, more tokens than a program takes"),
    pytest.param(2, 80, 2, 3, id="80 heads"),
]


@needs_triton
@pytest.mark.parametrize(("tokens", "heads", "n", "rows"), SHAPES)
@pytest.mark.parametrize("kind", ["fp8", "fp16", "fp32", *(["bf16"] if ON_GPU else [])])
def test_triton(tokens: int, heads: int, n: int, rows: int, kind: str) -> None:
    queries, weights, table, pages = parts(tokens, heads, n, rows)
    kinds = {"fp8": fp8, "fp16": torch.Tensor.half, "fp32": torch.Tensor.float, "bf16": torch.Tensor.bfloat16}
    given = kinds[kind](queries)
    exact = given.view(torch.float8_e4m3fn).double() if kind == "fp8" else given.double()
    logits = entry_logits(exact, weights.double(), table[pages])
    threshold = float(logits.flatten().quantile(0.8))
    threshold += float((logits.flatten().sort().values - threshold).clamp(min=1e-3).min()) / 2  # between two of them
    best, count = retriever_score_paged_reference(exact, weights.double(), table, pages, threshold)
    seen = _retriever_score_paged_triton(given, weights, table, pages, threshold)
    torch.testing.assert_close(seen[0], best.float(), rtol=1e-4, atol=1e-3)
    near = ((logits - threshold).abs() < 1e-3).sum(dim=2)  # may be counted or not
    assert bool(((seen[1] - count).abs() <= near).all())
    assert int(count.sum()) > 0


@needs_triton
def test_triton_reads_every_fp8_number() -> None:
    bits = torch.tensor([b for b in range(256) if b & 127 != 127], dtype=torch.uint8, device=DEVICE)
    table = torch.zeros((len(bits), ROW), dtype=torch.uint8, device=DEVICE)
    table[:, 5 * 128 + 7] = bits  # the 8th number of the 6th key
    table[:, 8192:] = torch.ones(ENTRIES, device=DEVICE).view(torch.uint8)
    queries = torch.zeros((2, 1, 128), device=DEVICE)
    queries[0, 0, 7], queries[1, 0, 7] = 1.0, -1.0
    pages = torch.arange(len(bits), device=DEVICE)
    best, _ = _retriever_score_paged_triton(fp8(queries), torch.ones((2, 1), device=DEVICE), table, pages)
    assert torch.equal(best[0] - best[1], bits.view(torch.float8_e4m3fn).float())


@pytest.mark.skipif(ON_GPU or INTERPRETED, reason="the tests above run here themselves")
def test_triton_under_the_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", str(pathlib.Path(__file__)), "-q", "-n", "0", "-p", "no:cacheprovider"]
    command += ["-k", "test_triton"]
    run = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert run.returncode == 0 and "16 passed, 1 skipped" in run.stdout, run.stdout[-5000:] + run.stderr[-2000:]
