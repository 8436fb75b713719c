"""What the DeepSeek-V4 backend makes of SGLang's metadata: its own method runs, over a table of virtual pages."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from sglang.srt.layers.attention import deepseek_v4_backend as stock
from sglang.srt.layers.attention.dsv4.indexer import C4IndexerBackendMixin

from sglang_lsa.attend.dsv4 import LsaDeepseekV4Backend
from sglang_lsa.memory.resident_table import ResidentTable

PAGE, CONTEXT_PAGES, VIRTUAL, PHYSICAL = 256, 12, 40, 9


def compressed(seq_lens, positions, out_loc, page_table, page_size, compute_page_indices):
    """SGLang's Triton kernel of the same arguments, in torch."""
    made: list[torch.Tensor] = []
    for ratio in (4, 128):
        length = seq_lens // ratio
        where = torch.where(seq_lens % ratio == 0, out_loc // ratio, 0).long()
        made += [where, positions // ratio * ratio, length, length.clamp(min=1)]
    per_page = page_size // 128
    slots = (page_table[:, :, None] * per_page + torch.arange(per_page)).flatten(1).int()
    slots = torch.where(torch.arange(slots.shape[1]) < made[6][:, None], slots, -1)
    return (*made, slots)


class Observer:
    """Notes what it is shown."""

    def __init__(self, hidden: tuple[int, ...] = (), queries: tuple[int, ...] = ()):
        self.hidden, self.queries = hidden, queries
        self.begun: list[tuple[list[int], list[int]]] = []
        self.seen: list[tuple[str, int, Any]] = []

    def begin(self, rows: torch.Tensor, positions: torch.Tensor) -> None:
        self.begun.append((rows.tolist(), positions.tolist()))

    def wants_hidden(self, layer: int) -> bool:
        return layer in self.hidden

    def wants_query(self, layer: int) -> bool:
        return layer in self.queries

    def capture_hidden(self, layer: int, x: torch.Tensor) -> None:
        self.seen.append(("hidden", layer, len(x)))

    def capture_index_query(self, layer: int, q: torch.Tensor, weights: torch.Tensor) -> None:
        self.seen.append(("query", layer, (q, weights)))


class World:
    """Rows 1 and 2 have pages 1 to 12 and 13 to 24, of which the device holds some; row 0 is padding."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, observer: Observer | None = None):
        monkeypatch.setattr(stock, "_init_compression_metadata_triton", compressed)
        monkeypatch.setattr(stock, "_create_flashmla_metadata", lambda: None)
        self.req_to_token = torch.zeros((3, CONTEXT_PAGES * PAGE), dtype=torch.int32)
        slots = torch.arange(CONTEXT_PAGES * PAGE, dtype=torch.int32)
        self.req_to_token[1], self.req_to_token[2] = slots + PAGE, slots + (1 + CONTEXT_PAGES) * PAGE
        self.v2p = torch.zeros(VIRTUAL + 1, dtype=torch.int32)
        self.table = ResidentTable(3, CONTEXT_PAGES, PAGE)
        self.gates: list[int] = []
        layout = SimpleNamespace(physical_pages=PHYSICAL)
        pager = SimpleNamespace(v2p=self.v2p, layout=layout, page=PAGE, device=torch.device("cpu"))
        prefill = SimpleNamespace(before_layer=self.gates.append)
        self.observer = observer or Observer()
        self.lsa = SimpleNamespace(pager=pager, prefill=prefill, table=self.table, observer=self.observer)
        self.stock = self._backend(stock.DeepseekV4AttnBackend)
        self.backend = self._backend(LsaDeepseekV4Backend)
        self.backend.lsa = self.lsa

    def _backend(self, kind: type) -> Any:
        backend = object.__new__(kind)
        backend.page_size, backend.swa_page_size, backend.c4_topk = PAGE, 128, 512
        backend.req_to_token, backend.is_dspark_draft = self.req_to_token, False
        backend.cuda_int32_kwargs = {"device": torch.device("cpu"), "dtype": torch.int32}
        mapping = torch.arange((VIRTUAL + 1) * PAGE + 1) * 3
        backend.token_to_kv_pool = SimpleNamespace(full_to_swa_index_mapping=mapping)
        return backend

    def resident(self, row: int, positions: list[int], tail_start: int, physical: list[int], tail: list[int]) -> None:
        """``row`` reads these pages, which lie in these device pages, and those from ``tail_start`` on in these."""
        own = self.req_to_token[row, ::PAGE] // PAGE
        self.v2p[own[positions].long()] = torch.tensor(physical, dtype=torch.int32)
        self.v2p[own[tail_start : tail_start + len(tail)].long()] = torch.tensor(tail, dtype=torch.int32)
        self.table.remap(row, np.array(physical), tail_start)

    def make(self, backend: Any, rows: list[int], lengths: list[int], **options: Any) -> stock.DSV4AttnMetadata:
        last = torch.tensor(lengths) - 1
        out_loc = self.req_to_token[torch.tensor(rows), last].long()
        given = self.req_to_token, torch.tensor(rows), torch.tensor(lengths, dtype=torch.int32)
        return backend.make_core_attn_metadata(*given, CONTEXT_PAGES * PAGE, out_loc, **options)


VIRTUAL_FIELDS = (
    "raw_out_loc",
    "seq_lens_casual",
    "positions_casual",
    "swa_page_indices",
    "swa_topk_lengths",
    "c128_out_loc",
    "c128_page_indices",
    "c128_topk_lengths_clamp1",
)


def assert_virtual_parts_are_stock(seen: stock.DSV4AttnMetadata, expected: stock.DSV4AttnMetadata) -> None:
    for name in VIRTUAL_FIELDS:
        assert torch.equal(getattr(seen, name), getattr(expected, name)), name


def assert_same_kinds(seen: stock.DSV4AttnMetadata, expected: stock.DSV4AttnMetadata) -> None:
    """Kernels take these as they take the stock ones."""
    for name in ("page_table", "c4_out_loc", "c4_topk_lengths_raw", "c4_topk_lengths_clamp1", "c4_sparse_topk_lengths"):
        one, other = getattr(seen, name), getattr(expected, name)
        assert (one.dtype, one.ndim, len(one), one.is_contiguous()) == (other.dtype, other.ndim, len(other), True), name


def test_decode_reads_resident_pages_and_the_tail(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch)
    world.resident(1, [0, 3, 7], 10, [4, 9, 2], tail=[6, 1])
    world.resident(2, [1], 2, [5], tail=[8])
    rows, lengths = [1, 2, 0], [10 * PAGE + 300, 2 * PAGE + 3, 1]
    seen, expected = (world.make(backend, rows, lengths) for backend in (world.backend, world.stock))
    assert seen.page_table.tolist() == [[4, 9, 2, 6, 1, 0, 0, 0, 0], [5, 8, *[0] * 7], [0] * PHYSICAL]
    assert seen.c4_topk_lengths_raw.tolist() == [3 * 64 + 75, 64 + 0, 0]
    assert seen.c4_topk_lengths_clamp1.tolist() == [267, 64, 1]
    assert seen.c4_sparse_topk_lengths.tolist() == [267, 64, 1]
    assert seen.c4_out_loc.tolist() == [1 * 64 + (300 - 256) // 4 - 1, 0, 0]
    assert_virtual_parts_are_stock(seen, expected)
    assert_same_kinds(seen, expected)
    assert world.observer.begun == [(rows, [length - 1 for length in lengths])]


def test_sparse_lengths_are_at_most_the_top_k(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch)
    world.resident(1, [*range(8)], 10, [*range(1, 9)], tail=[9])
    seen = world.make(world.backend, [1], [10 * PAGE + 8])
    assert (seen.c4_topk_lengths_raw.item(), seen.c4_sparse_topk_lengths.item()) == (514, 512)


def test_a_dense_request_reads_what_stock_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch)
    world.resident(1, [], 0, [], tail=[3, 1, 4])
    seen, expected = (world.make(backend, [1], [2 * PAGE + 4]) for backend in (world.backend, world.stock))
    assert seen.page_table.tolist() == [[3, 1, 4, *[0] * 6]]
    for name in ("c4_topk_lengths_raw", "c4_topk_lengths_clamp1", "c4_sparse_topk_lengths"):
        assert torch.equal(getattr(seen, name), getattr(expected, name)), name


def test_prefill_translates_every_page_and_leaves_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch)
    world.resident(1, [], 0, [], tail=[3, 1, 4])
    world.table.remap(1, np.array([7]), 2)  # of a request before: a prompt does not look at it
    lengths = [2 * PAGE - 1, 2 * PAGE, 2 * PAGE + 1]
    seen, expected = (
        world.make(backend, [1, 1, 1], lengths, is_prefill=True) for backend in (world.backend, world.stock)
    )
    assert seen.page_table.tolist() == [[3, 1, 4, *[0] * 9]] * 3
    assert seen.c4_out_loc.tolist() == [0, 1 * 64 + 63, 0]
    assert torch.equal(seen.c4_topk_lengths_raw, expected.c4_topk_lengths_raw)
    assert seen.c4_sparse_raw_indices is not None
    assert_virtual_parts_are_stock(seen, expected)
    assert_same_kinds(seen, expected)


def test_indexer_and_attention_read_one_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """SGLang asserts that both metadata hold the same tensor."""
    world = World(monkeypatch)
    core = world.make(world.backend, [1], [5])
    made = SimpleNamespace(**vars(core))
    monkeypatch.setattr(stock, "PagedIndexerMetadata", lambda **given: SimpleNamespace(**given))
    world.backend.enable_deepseek_v4_fp4_indexer = False
    indexer = world.backend.init_forward_metadata_indexer(core)
    assert indexer.page_table is core.page_table is made.page_table
    assert indexer.c4_seq_lens is core.c4_topk_lengths_raw


@pytest.mark.parametrize("extend", [True, False], ids=["prefill", "decode"])
def test_the_index_is_shown_where_somebody_looks(monkeypatch: pytest.MonkeyPatch, extend: bool) -> None:
    world = World(monkeypatch, Observer(hidden=(1,), queries=(3,)))
    backend = world.backend
    backend.forward_metadata = SimpleNamespace(core_metadata=SimpleNamespace(positions=torch.arange(4)))
    prepared = object(), object()

    def forward(self, x, c4_indexer, **options):
        return self._forward_prepare_normal(x=x, c4_indexer=c4_indexer)

    monkeypatch.setattr(C4IndexerBackendMixin, "forward_c4_indexer", forward)
    monkeypatch.setattr(C4IndexerBackendMixin, "_forward_prepare_normal", lambda self, **given: prepared)
    batch = SimpleNamespace(forward_mode=SimpleNamespace(is_extend=lambda: extend))
    for layer in (1, 3, 5):
        indexer = SimpleNamespace(layer_id=layer)
        backend.forward_c4_indexer(
            x=torch.zeros(6, 2), q_lora=torch.zeros(6, 2), c4_indexer=indexer, forward_batch=batch
        )
    assert world.observer.seen == [("hidden", 1, 4), ("query", 3, prepared)]
    assert world.gates == ([1, 3, 5] if extend else [])
