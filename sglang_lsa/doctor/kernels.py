"""The kernels: which kind runs here, and each of them once against its reference, on tiny inputs."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from sglang_lsa.doctor.findings import OK, SKIPPED, TROUBLE, Finding

if TYPE_CHECKING:
    import torch

SECTION = "kernels"
TRITON, INTERPRETED, REFERENCE = "triton", "interpreted", "reference"
LIMIT = 2e-3
"""Absolute difference that sums of a few float32 products may show; copies must be equal."""

Outputs = tuple["torch.Tensor", "torch.Tensor", float]
"""What a kernel made, what its reference made, and how far they may differ."""


def kernel_mode() -> str:
    """``triton`` with a GPU, ``interpreted`` with ``TRITON_INTERPRET=1``, else ``reference`` (plain torch)."""
    import torch

    if os.environ.get("TRITON_INTERPRET") == "1":
        return INTERPRETED
    return TRITON if torch.cuda.is_available() else REFERENCE


def kernel_findings() -> tuple[str | None, list[Finding]]:
    """Mode, or None when torch or Triton cannot be used, and a line for every kernel."""
    try:
        mode = kernel_mode()
        checks = _checks()
    except Exception as error:
        why = "every server needs its kernels"
        seen = f"cannot be imported ({error!r})"
        return None, [Finding(SECTION, "kernels", TROUBLE, seen, why, "see the versions above")]
    if mode == REFERENCE:
        seen = f"{len(checks)} kernels, not run"
        return mode, [Finding(SECTION, "kernels", SKIPPED, seen, "without a GPU their references in torch serve")]
    return mode, [kernel_finding(name, check, mode) for name, check in checks.items()]


def kernel_finding(name: str, check: Callable[[str], Outputs], mode: str) -> Finding:
    """Run one kernel and compare."""
    import torch

    device = "cuda" if mode == TRITON else "cpu"
    why, fix = "servers would read or choose wrong pages", "check the version of triton, and the driver"
    try:
        seen, expected, limit = check(device)
        difference = float((seen.to("cpu", torch.float64) - expected.to("cpu", torch.float64)).abs().max())
    except Exception as error:
        return Finding(SECTION, name, TROUBLE, f"failed ({type(error).__name__}: {error})"[:400], why, fix)
    if difference <= limit:  # false for NaN
        return Finding(SECTION, name, OK, f"{mode}, differs by {difference:.1g}" if limit else f"{mode}, equal")
    return Finding(
        SECTION, name, TROUBLE, f"differs from its reference by {difference:.3g}, {limit} is right", why, fix
    )


def _checks() -> dict[str, Callable[[str], Outputs]]:
    """By the name of the kernel's module; each takes the device."""
    import torch

    from sglang_lsa.kernels import (
        attention_mass,
        bound_score,
        compact_table,
        merge_shared,
        merge_states,
        page_keys,
        page_move,
        page_score,
        page_table,
        project_queries,
        record,
        retriever_score,
        retriever_score_paged,
        weigh_heads,
    )

    def random(device: str, *shape: int, seed: int = 0) -> torch.Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)

    def ids(device: str, values: Sequence[int], dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.tensor(list(values), dtype=dtype, device=device)

    def move(device: str) -> Outputs:
        mirror, target = random("cpu", 4, 2 * 64 * 2 * 16).view(torch.uint8), torch.zeros(4, 16384, dtype=torch.uint8)
        if device == "cuda":
            mirror, target = mirror.pin_memory(), target.pin_memory()
        buffers = [torch.zeros(4, 8192, dtype=torch.uint8, device=device) for _ in range(2)]
        there, back = ids(device, [1, 3]), ids(device, [2, 1])
        run = page_move.move_pages_triton
        run(page_move.moves(buffers, [0, 8192], mirror), there, mirror, back, to_host=False)
        run(page_move.moves(buffers, [0, 8192], target), there, target, back, to_host=True)
        if device == "cuda":
            torch.cuda.synchronize()
        return target[[2, 1]], mirror[[2, 1]], 0.0

    def keys(device: str) -> Outputs:
        pools = [random("cpu", 4 * 64, 2, 16, seed=layer) for layer in range(2)]
        seen, expected = torch.zeros(5, 2, 2, 2, 16, device=device), torch.zeros(5, 2, 2, 2, 16)
        moved = [pool.to(device) for pool in pools]
        page_keys._store_key_bounds_triton(moved, ids(device, [1, 3]), ids(device, [4, 2]), seen, 64)
        page_keys.store_key_bounds_reference(pools, ids("cpu", [1, 3]), ids("cpu", [4, 2]), expected, 64)
        return seen, expected, 0.0

    def bounds(device: str) -> Outputs:
        queries, table = random("cpu", 3, 2, 4, 16), random("cpu", 6, 2, 2, 2, 16, seed=1).sort(dim=2).values
        pages = ids("cpu", [5, 1, 2])
        expected = bound_score.bound_score_reference(queries, table, pages, 0.25)
        seen = bound_score._bound_score_triton(queries.to(device), table.to(device), pages.to(device), 0.25)
        return seen, expected, LIMIT

    def score(kernel: Callable[..., torch.Tensor], device: str) -> Outputs:
        queries, pages = random("cpu", 4, 3, 16), ids("cpu", range(40, 20, -1))  # two blocks of pages
        table, key_of_head = page_score.to_8_bits(random("cpu", 41, 2, 8, 16, seed=1)), ids("cpu", [0, 0, 1, 1])
        expected = page_score.page_score_reference(queries, table, pages, key_of_head, 2)
        return kernel(*(tensor.to(device) for tensor in (queries, table, pages, key_of_head)), 2), expected, LIMIT

    def projected(device: str) -> Outputs:
        ring, heads, tower = random("cpu", 2, 4, 2, 3, 16), ids("cpu", [5, 1]), random("cpu", 2, 16, 8, seed=1)
        spans = ids("cpu", [1, 0, 4, 0, 0, 0, 0, 4, 0, 0]).view(2, 5)
        asked = (page_score.Ragged(spans, spans.to(where), spans[:0].to(where)) for where in ("cpu", device))
        expected = project_queries.project_queries_reference(ring, next(asked), heads, tower)
        moved = [tensor.to(device) for tensor in (ring, heads, tower)]
        return project_queries._project_queries_triton(moved[0], next(asked), *moved[1:]), expected, LIMIT

    def weighed(device: str) -> Outputs:
        shares, weights = random("cpu", 3, 300), random("cpu", 3, seed=1)
        expected = weigh_heads.weigh_heads_reference(shares, weights, 1.5)
        return weigh_heads._weigh_heads_triton(shares.to(device), weights.to(device), 1.5), expected, LIMIT

    def table(device: str) -> Outputs:
        def indices(where: str, run: Callable[..., None]) -> torch.Tensor:
            rows = torch.tensor([[0, 0, 0, 0], [2, 3, 3, 1]], dtype=torch.int32, device=where)
            slots = torch.arange(2 * 256, device=where, dtype=torch.int32).view(2, 256)
            lengths = ids(where, [200])
            offsets, found = ids(where, [0, 0], torch.int32), torch.full((256,), -1, dtype=torch.int32, device=where)
            v2p = torch.arange(16, device=where, dtype=torch.int32).flip(0).contiguous()
            run(rows, slots, v2p, ids(where, [1]), lengths, 64, offsets, found)
            return torch.cat((offsets, found[: 2 * 64 + 8]))

        expected = indices("cpu", page_table.decode_indices_reference)
        return indices(device, page_table._decode_indices_triton), expected, 0.0

    def pages(device: str) -> Outputs:
        def named(where: str, run: Callable[..., None]) -> torch.Tensor:
            rows = torch.tensor([[0, 0, 0, 0], [2, 3, 3, 1]], dtype=torch.int32, device=where)
            slots = torch.arange(2 * 256, device=where, dtype=torch.int32).view(2, 256)
            found, lengths = torch.full((1, 4), -1, dtype=torch.int32, device=where), ids(where, [0], torch.int32)
            v2p = torch.arange(16, device=where, dtype=torch.int32).flip(0).contiguous()
            run(rows, slots, v2p, ids(where, [1]), ids(where, [200]), 64, found, lengths)
            return torch.cat((found[0], lengths))

        expected = named("cpu", page_table.decode_pages_reference)
        return named(device, page_table._decode_pages_triton), expected, 0.0

    def slots(device: str) -> Outputs:
        virtual, v2p = ids("cpu", range(0, 640, 7)), torch.arange(10, dtype=torch.int32).flip(0).contiguous()
        expected = page_table.physical_slots_reference(virtual, v2p, 64)
        return page_table._physical_slots_triton(virtual.to(device), v2p.to(device), 64), expected, 0.0

    def recorded(device: str) -> Outputs:
        seen, expected = torch.zeros(3, 4, 2, 32, device=device), torch.zeros(3, 4, 2, 32)
        source, rows, positions = random("cpu", 3, 32), ids("cpu", [1, 1, 2]), ids("cpu", [5, 6, 3])
        record._record_triton(source.to(device), rows.to(device), positions.to(device), seen, 1)
        record.record_reference(source, rows, positions, expected, 1)
        return seen, expected, 0.0

    def merged(device: str) -> Outputs:
        def run(where: str, merge: Callable[..., None]) -> torch.Tensor:
            out, lse = random(where, 3, 2, 16), random(where, 3, 2, seed=1)
            merge(out, lse, random(where, 3, 2, 16, seed=2), random(where, 3, 2, seed=3))
            return torch.cat((out, lse[..., None]), dim=-1)

        return run(device, merge_states._merge_states_triton), run("cpu", merge_states.merge_states_reference), LIMIT

    def shared(device: str) -> Outputs:
        def run(where: str, merge: Callable[..., None]) -> torch.Tensor:
            out, part = random(where, 3, 2, 16), random(where, 2, 2, 16, seed=2)
            merge(out, random(where, 3, 2, seed=1), part, random(where, 2, 2, seed=3), ids(where, [1, -1, 0]))
            return out

        return run(device, merge_shared._merge_shared_triton), run("cpu", merge_shared.merge_shared_reference), LIMIT

    def mass(device: str) -> Outputs:
        def run(where: str, attend: Callable[..., torch.Tensor]) -> torch.Tensor:
            queries, keys = random(where, 3, 4, 16), random(where, 80, 2, 16, seed=1)
            return attend(queries, keys, ids(where, range(79, 9, -1)), ids(where, [67, 68, 69]), 0.25, 64)

        kernel = attention_mass._attention_mass_triton
        return run(device, kernel), run("cpu", attention_mass.attention_mass_reference), LIMIT

    def retriever(device: str) -> Outputs:
        queries, weights = random("cpu", 2, 4, 128) / 8, random("cpu", 2, 4, seed=1) / 4
        packed = retriever_score.pack_keys(random("cpu", 5, 128, seed=2))
        expected = retriever_score.retriever_score_reference(queries, weights, packed)
        seen = retriever_score._retriever_score_triton(queries.to(device), weights.to(device), packed.to(device))
        return seen, expected, LIMIT

    def paged(device: str) -> Outputs:
        queries, weights = random("cpu", 2, 4, 128) / 8, random("cpu", 2, 4, seed=1) / 4
        rows, pages = retriever_score_paged.pack_pages(random("cpu", 4, 64, 128, seed=2)), ids("cpu", [3, 1, 2])
        expected, _ = retriever_score_paged.retriever_score_paged_reference(queries, weights, rows, pages)
        moved = (tensor.to(device) for tensor in (queries, weights, rows, pages))
        return retriever_score_paged._retriever_score_paged_triton(*moved)[0], expected, LIMIT

    def compact(device: str) -> Outputs:
        def named(where: str, run: Callable[..., None]) -> torch.Tensor:
            rows = torch.tensor([[0, 0, 0, 0], [2, 3, 3, 1]], dtype=torch.int32, device=where)
            slots = torch.arange(2 * 2048, device=where, dtype=torch.int32).view(2, 2048)
            found, entries = torch.full((1, 6), -1, dtype=torch.int32, device=where), ids(where, [0], torch.int32)
            v2p = torch.arange(32, device=where, dtype=torch.int32).flip(0).contiguous()
            run(rows, slots, v2p, ids(where, [1]), ids(where, [1030]), 256, 4, found, entries)
            return torch.cat((found[0], entries))

        expected = named("cpu", compact_table.compact_table_reference)
        return named(device, compact_table._compact_table_triton), expected, 0.0

    return {
        "page_move": move,
        "page_keys": keys,
        "bound_score": bounds,
        "page_score": functools.partial(score, page_score._page_score_triton),
        "project_queries": projected,
        "weigh_heads": weighed,
        "decode_indices": table,
        "decode_pages": pages,
        "physical_slots": slots,
        "record": recorded,
        "merge_shared": shared,
        "merge_states": merged,
        "attention_mass": mass,
        "retriever_score": retriever,
        "retriever_score_paged": paged,
        "compact_table": compact,
    }
