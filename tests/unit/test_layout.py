"""KV layouts: the bytes of a page are what they were, and a layout that nobody knows goes all the way."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from simulated_gpu import SimulatedGPU

from sglang_lsa.engine.observe import PageKeys
from sglang_lsa.kernels.page_table import resident_slots
from sglang_lsa.memory.layout.base import KVLayout, Piece, as_pages
from sglang_lsa.memory.layout.mha import MhaLayout, mha_shape
from sglang_lsa.memory.layout.mha_fp8 import MhaFp8Layout
from sglang_lsa.memory.pager import Pager
from sglang_lsa.memory.progress import Done, Progress
from sglang_lsa.memory.resident_table import ResidentTable
from sglang_lsa.memory.staging import Staging, decoded_bytes, staging_bytes

# --- the bytes of a page ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("page", "dtype", "checksum"),
    [
        (16, torch.float32, "c7553c4044f1ed2aaca6c6c36fb9b5ffc255807ba720aa6acaaa21ad684e31c9"),
        (16, torch.bfloat16, "5969883f55d79014cebe7f7d7eee82733a1e0c917df392b6085d74ee31ee1ffc"),
        (64, torch.float32, "617eb191ee8a1d21cb82ca7949b93a61354f63f97e7ced01383a91ef114373b8"),
        (64, torch.bfloat16, "d8bc1df99e54ff35c501f41c59db3edcb5d5e0ffab549f10fbf55f192bd50321"),
        (256, torch.float32, "8b086d9d344e1622c8f225a1a3941f34beba3455dfe34a1a722b68ca20f359ad"),
        (256, torch.bfloat16, "6b22927503aa2aa2aa2e836e16b605bbcd408560b181eeeb4389b38887bd77c5"),
    ],
)
def test_the_mirrors_bytes_of_a_fixed_pool_are_what_they_were(page: int, dtype: torch.dtype, checksum: str) -> None:
    """Computed before there were layouts, of a mirror ``[pages, layers, 2, page, kv_heads, head_dim]``."""
    pools = torch.randn(2, 3, 6 * page, 2, 16, generator=torch.Generator().manual_seed(18)).to(dtype)
    keys, values = ([layer.clone() for layer in pool] for pool in pools)
    pager = Pager(MhaLayout(keys, values, page), 9)
    pager.ledger.allocate(range(1, 10))
    assert pager.hold("a", [7, 2, 4])
    pager.store(np.array([2, 7, 4]))
    stored = pager.mirror.pages[[2, 4, 7]].numpy().tobytes()
    assert hashlib.sha256(stored).hexdigest() == checksum


# --- a layout that only this file knows ------------------------------------------------------------------------------

PAGE, PHYSICAL, VIRTUAL = 16, 4, 10


class OddLayout(KVLayout):
    """16 tokens a page; layer 1 has no pages; layer 2 keeps 13 bytes a page beside keys and values; keys are wider."""

    def __init__(self) -> None:
        pools = [(0, pool(7)), (0, pool(3)), (2, pool(8)), (2, pool(5)), (3, pool(24)), (3, pool(8))]
        buffers = [(layer, as_pages(buffer, PAGE)) for layer, buffer in pools]
        super().__init__(PAGE, [*buffers[:4], (2, torch.zeros(PHYSICAL + 1, 13, dtype=torch.uint8)), *buffers[4:]])

    def keys(self, layer: int, physical: torch.Tensor) -> torch.Tensor:
        """Bytes taken for floats, one KV head."""
        return self.by_layer[layer][0].buffer[physical].view(len(physical), PAGE, 1, -1).float()

    def staged(self, layer: int, block: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
        return list(block)


def pool(width: int) -> torch.Tensor:
    """A buffer of so many bytes a token."""
    return torch.zeros((PHYSICAL + 1) * PAGE, width, dtype=torch.uint8)


class Pages:
    """A pager over the odd layout; every page has bytes of its own."""

    def __init__(self, progress: Progress | None = None) -> None:
        self.layout = OddLayout()
        self.pager = Pager(self.layout, VIRTUAL, progress)
        self.pager.ledger.allocate(range(1, VIRTUAL + 1))
        shape = (VIRTUAL + 1, self.layout.page_bytes)
        self.content = torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(3))

    def use(self, holder: str, *pages: int) -> None:
        """A request writes these pages, they are mirrored, and it ends."""
        assert self.pager.hold(holder, pages)
        for page in pages:
            for piece, content in self.pieces(page):
                piece.buffer[int(self.pager.v2p[page])] = content
        self.pager.store(np.array(pages))
        self.pager.forget(holder)

    def pieces(self, page: int) -> list[tuple[Piece, torch.Tensor]]:
        content = self.content[page]
        return [(piece, content[piece.offset : piece.offset + piece.nbytes]) for piece in self.layout.pieces]

    def assert_on_device(self, page: int) -> None:
        place = int(self.pager.v2p[page])
        assert place > 0
        for piece, content in self.pieces(page):
            assert torch.equal(piece.buffer[place], content), f"layer {piece.layer}"


def test_an_odd_page_is_the_sum_of_its_pieces() -> None:
    layout = OddLayout()
    assert layout.page_bytes == layout.shape.page_bytes == PAGE * (7 + 3 + 8 + 5 + 24 + 8) + 13
    assert layout.shape.layers == ((112, 48), (128, 80, 13), (384, 128))
    assert (list(layout.by_layer), layout.physical_pages) == ([0, 2, 3], PHYSICAL)
    assert [piece.offset for piece in layout.pieces] == [0, 112, 160, 288, 368, 381, 765]


def test_odd_pages_are_stored_evicted_and_recalled() -> None:
    server = Pages()
    server.use("a", 1, 2, 3)
    server.use("b", 4, 5, 6, 7)
    assert not server.pager.ledger.on_device([1, 2, 3]).any()
    assert torch.equal(server.pager.mirror.pages[1:8], server.content[1:8])
    for piece in server.layout.pieces:
        piece.buffer.zero_()
    assert server.pager.hold("c", [3, 1, 2])
    for page in (1, 2, 3):
        server.assert_on_device(page)
    assert server.pager.ledger.recalls == 3
    server.pager.ledger.check()


def test_odd_pages_are_recalled_late_and_layer_by_layer() -> None:
    server = Pages()
    server.use("a", 1, 2, 3)
    server.use("b", 4, 5, 6, 7)
    gpu = SimulatedGPU(server.pager)
    assert server.pager.hold("c", [2, 3], layer_by_layer=True)
    for piece in server.layout.pieces:
        piece.buffer.zero_()
    assert not server.pager.arrived(np.array([2, 3]))
    gpu._recall()
    place = int(server.pager.v2p[2])
    assert [bool(pieces[0].buffer[place].any()) for pieces in server.layout.by_layer.values()] == [True, False, False]
    gpu.arrive()
    assert server.pager.arrived(np.array([2, 3]))
    server.assert_on_device(2)
    server.assert_on_device(3)
    server.pager.ledger.check()


def test_odd_pages_are_streamed() -> None:
    server, pages = Pages(), [7, 1, 4, 2, 6]
    server.use("a", 1, 2, 3)
    server.use("b", 4, 5, 6, 7)
    staging = Staging(server.layout, server.pager.mirror.pages, 2, lambda: pytest.fail("no stream on a CPU"))
    assert staging.nbytes == staging_bytes(2, server.layout.shape) == 2 * 2 * (384 + 128)
    staged = staging.read(np.array(pages))
    assert staged.sizes == [2 * PAGE, 2 * PAGE, PAGE]
    for layer in range(4):
        blocks = [[part.clone() for part in block] for block in staged.layer(layer)]
        if layer == 1:
            assert blocks == []
            continue
        for which, piece in enumerate(server.layout.by_layer[layer]):
            wanted = server.content[pages, piece.offset : piece.offset + piece.nbytes]
            assert torch.equal(torch.cat([block[which] for block in blocks]), wanted)


def test_bounds_of_odd_keys() -> None:
    server = Pages()
    server.use("a", 1, 2)
    remembered = PageKeys(VIRTUAL, server.layout, [2])
    remembered.complete(np.array([1, 2]), server.pager.ledger.v2p[[1, 2]])
    keys = server.content[[1, 2], 160:288].view(2, PAGE, 1, 8).float()
    assert torch.equal(remembered.table[[1, 2], 0, 0], keys.amin(dim=1))
    assert torch.equal(remembered.table[[1, 2], 0, 1], keys.amax(dim=1))


# --- FP8 -------------------------------------------------------------------------------------------------------------

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
SCALES = {0: (0.37, 2.5), 1: (1.0, 1.0), 2: (3.0, 0.01)}
HEADS, DIM = 2, 8


class Fp8:
    """Three layers of random numbers in FP8, mirrored; ``shown`` is what they stand for, in float32."""

    def __init__(self, stored: torch.dtype, computed: torch.dtype):
        made = torch.Generator().manual_seed(7)
        shape = (2, 3, VIRTUAL + 1, PAGE, HEADS, DIM)
        self.content = (torch.randn(shape, generator=made) * 3).to(stored)
        pools = [[torch.zeros((PHYSICAL + 1) * PAGE, HEADS, DIM, dtype=torch.uint8) for _ in SCALES] for _ in range(2)]
        self.layout = MhaFp8Layout(*pools, PAGE, stored, computed, SCALES.__getitem__)
        self.pager = Pager(self.layout, VIRTUAL)
        self.pager.ledger.allocate(range(1, VIRTUAL + 1))

    def shown(self, which: int, layer: int, pages: list[int]) -> torch.Tensor:
        return self.content[which, layer, pages].float() * SCALES[layer][which]

    def use(self, holder: str, pages: list[int]) -> None:
        assert self.pager.hold(holder, pages)
        for layer, pieces in self.layout.by_layer.items():
            for which, piece in enumerate(pieces):
                content = self.content[which, layer, pages].view(torch.uint8)
                piece.buffer[self.pager.v2p[pages].long()] = content.flatten(1)
        self.pager.store(np.array(pages))
        self.pager.forget(holder)


def test_an_fp8_page_has_a_byte_for_each_number() -> None:
    layout = Fp8(torch.float8_e4m3fn, torch.bfloat16).layout
    assert layout.shape == mha_shape(PAGE, 3, HEADS, DIM, DIM, 1, decoded=2)
    assert 2 * layout.page_bytes == mha_shape(PAGE, 3, HEADS, DIM, DIM, 2).page_bytes
    assert (layout.kv_heads, layout.head_dim, layout.compute_dtype) == (HEADS, DIM, torch.bfloat16)
    assert not layout.key_buffers
    assert decoded_bytes(5, layout.shape) == 2 * 5 * PAGE * 2 * HEADS * DIM * 2
    assert decoded_bytes(5, mha_shape(PAGE, 3, HEADS, DIM, DIM, 2)) == 0


@pytest.mark.parametrize("computed", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stored", FP8)
def test_fp8_pages_come_back_as_they_left(stored: torch.dtype, computed: torch.dtype) -> None:
    """Evicted and recalled; their keys are the dequantised ones, in the type of the model."""
    server = Fp8(stored, computed)
    server.use("a", [1, 2, 3])
    server.use("b", [4, 5, 6, 7])
    assert not server.pager.ledger.on_device([1, 2, 3]).any()
    for piece in server.layout.pieces:
        piece.buffer.zero_()
    assert server.pager.hold("c", [3, 1, 2])
    places = server.pager.v2p[[3, 1, 2]].long()
    for layer in SCALES:
        assert torch.equal(server.layout.keys(layer, places), server.shown(0, layer, [3, 1, 2]).to(computed))
    together = server.layout.keys_of((2, 0), places)
    assert together.shape == (3, PAGE, 2, HEADS, DIM)
    assert torch.equal(together[:, :, 1], server.layout.keys(0, places))
    server.pager.ledger.check()


@pytest.mark.parametrize("stored", FP8)
def test_fp8_pages_are_streamed(stored: torch.dtype) -> None:
    """As the model's numbers, or as they lie for attention that reads FP8."""
    server, pages = Fp8(stored, torch.bfloat16), [3, 1, 4, 2, 6]
    server.use("a", [1, 2, 3])
    server.use("b", [4, 5, 6, 7])
    staging = Staging(server.layout, server.pager.mirror.pages, 2, lambda: pytest.fail("no stream on a CPU"))
    for raw in (False, True):
        staged = staging.read(np.array(pages))
        for layer in SCALES:
            blocks = [[part.clone() for part in block] for block in staged.layer(layer, raw)]
            for which in range(2):
                seen = torch.cat([block[which].float() for block in blocks])
                shown = server.shown(which, layer, pages).flatten(0, 1)
                assert {block[which].dtype for block in blocks} == {stored if raw else torch.bfloat16}
                expected = shown if raw else shown.bfloat16().float()
                assert torch.equal(seen * server.layout.scales(layer)[which] if raw else seen, expected)


def test_bounds_of_fp8_keys_are_those_of_what_they_stand_for() -> None:
    server = Fp8(torch.float8_e4m3fn, torch.bfloat16)
    server.use("a", [1, 2])
    remembered = PageKeys(VIRTUAL, server.layout, [2, 0])
    remembered.complete(np.array([1, 2]), server.pager.ledger.v2p[[1, 2]])
    assert remembered.table.dtype == torch.bfloat16
    for slot, layer in enumerate((2, 0)):
        keys = server.shown(0, layer, [1, 2]).bfloat16()
        assert torch.equal(remembered.table[[1, 2], slot], torch.stack((keys.amin(dim=1), keys.amax(dim=1)), dim=1))


def test_scales_are_asked_for_when_they_are_needed() -> None:
    """An update of the weights may bring others."""
    server, scale = Fp8(torch.float8_e4m3fn, torch.float32), [1.0]
    server.layout._scales = lambda layer: (scale[0], scale[0])
    server.use("a", [1])
    place = server.pager.v2p[[1]].long()
    before = server.layout.keys(0, place)
    scale[0] = 2.0
    assert torch.equal(server.layout.keys(0, place), before * 2)


def test_a_layout_without_keys_has_none_to_stack() -> None:
    class Blind(OddLayout):
        def keys(self, layer: int, physical: torch.Tensor) -> None:
            return None

    with pytest.raises(ValueError, match="a Blind shows no keys"):
        Blind().keys_of((0, 2), torch.tensor([1]))


# --- any number of tokens --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", [16, 64, 256])
def test_pages_of_any_size_go_through_the_tables(page: int) -> None:
    """Pager, index of pages, resident table and kernels agree on what a page is."""
    keys, values = ([torch.randn((PHYSICAL + 1) * page, 1, 2)] for _ in range(2))
    pager = Pager(MhaLayout(keys, values, page), VIRTUAL)
    assert (pager.page, pager.page_index.page, pager.ledger.physical_pages) == (page, page, PHYSICAL)
    pager.ledger.allocate([7, 2, 5])
    assert pager.hold("a", [7, 2, 5])
    virtual = (torch.tensor([7, 2, 5])[:, None] * page + torch.arange(page)).flatten()
    assert pager.page_index.pages(virtual).tolist() == [7, 2, 5]
    places = pager.ledger.v2p[[7, 2, 5]]
    table = ResidentTable(2, 4, page)
    table.remap(1, places[:1], 2)  # page 7, not page 2, and the tail from page 5 on
    tokens = 2 * page + 3
    assert table.lengths(np.array([1]), np.array([tokens])).tolist() == [page + 3]
    (slots,) = resident_slots(
        table.pages, table.count, table.tail_start, torch.stack((virtual, virtual)), pager.v2p, *ones(tokens), page
    )
    read = ((places[0], page), (places[2], 3))
    assert slots.tolist() == [place * page + token for place, count in read for token in range(count)]


def ones(tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Row 1, alone in its batch, with so many tokens."""
    return torch.tensor([1]), torch.tensor([tokens])


# --- what a layout may be --------------------------------------------------------------------------------------------


class Anything(OddLayout):
    def __init__(self, *buffers: tuple[int, torch.Tensor]) -> None:
        KVLayout.__init__(self, PAGE, buffers)


BYTES = torch.zeros(3, 8, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("buffers", "words"),
    [
        pytest.param([], "no layer has pages", id="none"),
        pytest.param([(0, BYTES.float())], r"give contiguous uint8 \[pages, bytes\]", id="floats"),
        pytest.param([(0, BYTES[:, :4])], "with strides", id="not contiguous"),
        pytest.param([(0, BYTES), (1, BYTES[:2])], "a buffer of layer 1 has 2 pages, others have 3", id="pages"),
        pytest.param([(1, BYTES), (0, BYTES)], "layer 0 after layer 1", id="order"),
    ],
)
def test_what_is_no_layout_is_refused(buffers: list[tuple[int, torch.Tensor]], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Anything(*buffers)


def test_a_layer_of_mha_may_have_no_pages_and_values_may_be_narrower() -> None:
    keys, values = ([torch.zeros(3 * PAGE, 2, dim), None, torch.zeros(3 * PAGE, 2, dim)] for dim in (6, 4))
    layout = MhaLayout(keys, values, PAGE)
    assert (list(layout.by_layer), list(layout.key_buffers)) == ([0, 2], [0, 2])
    assert layout.shape == mha_shape(PAGE, 2, 2, 6, 4, 4)
    block = tuple(piece.buffer[1:] for piece in layout.by_layer[2])
    assert [part.shape for part in layout.staged(2, block)] == [(2 * PAGE, 2, 6), (2 * PAGE, 2, 4)]
    with pytest.raises(ValueError, match="layer 1 has keys or values only"):
        MhaLayout(keys, [values[0], values[0], values[2]], PAGE)


@pytest.mark.parametrize(("slots", "words"), [(40, "not whole pages of 16 tokens"), (64, "not contiguous")])
def test_a_buffer_of_parts_of_pages_is_refused(slots: int, words: str) -> None:
    buffer = torch.zeros(slots, 2, 3)
    with pytest.raises(ValueError, match=words):
        as_pages(buffer if slots % PAGE else buffer[:, :1], PAGE)


# --- what is finished ------------------------------------------------------------------------------------------------


def test_nothing_counts_as_finished_before_it_is_agreed_on() -> None:
    """As when another rank is behind."""

    class Behind(Progress):
        limit = Done(0, 0, 0)

        def agreed(self, seen: Done) -> Done:
            return Done(*map(min, seen, self.limit))

    progress = Behind()
    server = Pages(progress)
    gpu = SimulatedGPU(server.pager)
    server.use("a", 1, 2)
    number = server.pager.ledger.forward_started()
    server.pager.forward_queued(number)
    gpu._store()
    gpu.compute_to(len(gpu.compute))
    server.pager.poll()
    assert not server.pager.ledger.is_mirrored([1, 2]).any()
    server.pager.ledger.release([1])
    assert server.pager.ledger.obtainable_pages == PHYSICAL - 2
    progress.limit = Done(number, 1, 0)
    server.pager.poll()
    assert server.pager.ledger.is_mirrored([1, 2]).tolist() == [False, True]
    assert server.pager.ledger.obtainable_pages == PHYSICAL
    server.pager.ledger.check()
