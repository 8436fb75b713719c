"""What tests of the runtime's parts stand on: device pages and their content, and a policy that wants what it is told.

Everything is real but the model, which writes a number for each token, and, where a test asks for it, the streams of
a GPU (``simulated_gpu``), driven by hand.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from types import SimpleNamespace

import numpy as np
import torch
from release import MadeUp
from simulated_gpu import LAYERS, SimulatedGPU

from sglang_lsa.config import PAGE_SIZE
from sglang_lsa.engine.policies import Policy
from sglang_lsa.engine.request import Request
from sglang_lsa.memory.layout.mha import MhaLayout
from sglang_lsa.memory.pager import Pager

NONE = np.zeros(0, dtype=np.int64)


class Wanted(Policy):
    """A policy that wants certain positions; or fails."""

    queries = True

    def __init__(self) -> None:
        self.positions: list[int] = []
        self.values: dict[int, float] = {}
        """Scores of some positions, where it matters which is better."""
        self.error: Exception | None = None
        self.calls = 0

    def score(self, request: Request, pages: np.ndarray) -> np.ndarray | torch.Tensor:
        self.calls += 1
        if self.error is not None:
            raise self.error
        scores = np.zeros(len(pages))
        for position, value in (dict.fromkeys(self.positions, 1.0) | self.values).items():
            if position < len(pages):
                scores[position] = value
        return scores


class Server:
    """A pager, an allocator that hands out one page after the other, and a model that writes KV.

    Args:
        physical, virtual: pages of the device pool and of the mirror.
        page, heads, dim, dtype: of the KV.
    """

    gpu: SimulatedGPU
    """Once copies take time."""

    def __init__(
        self,
        physical: int,
        virtual: int,
        page: int = PAGE_SIZE,
        heads: int = 1,
        dim: int = 1,
        dtype: torch.dtype = torch.float32,
    ):
        keys, values = (
            [torch.zeros((physical + 1) * page, heads, dim, dtype=dtype) for _ in range(LAYERS)] for _ in range(2)
        )
        self.pools = keys, values
        self.pager = Pager(MhaLayout(keys, values, page), virtual)
        self.ledger = self.pager.ledger
        self.next_page = 1

    def late(self, stores: bool = True) -> SimulatedGPU:
        """From now on copies take time, as on a GPU; without ``stores``, those to the mirror do not."""
        self.gpu = SimulatedGPU(self.pager, late_stores=stores)
        return self.gpu

    # -- the allocator and the radix tree ------------------------------------------------------------------------

    def allocate(self, count: int) -> np.ndarray:
        pages = np.arange(self.next_page, self.next_page + count, dtype=np.int64)
        self.next_page += count
        self.ledger.allocate(pages)
        return pages

    def use(self, holder: str, *pages: int) -> None:
        """A request prefills ``pages``: they are written and mirrored."""
        self.hold(holder, pages)
        self.write(self.slots_of(pages))
        self.pager.store(np.array(pages))

    def memory(self, count: int) -> np.ndarray:
        """Pages of the radix tree, in the mirror; those that fit are on the device as well."""
        pages = self.allocate(count)
        for page in pages.tolist():
            self.use("earlier", page)
            self.pager.forget("earlier")
        return pages

    # -- who holds what ------------------------------------------------------------------------------------------

    def hold(self, holder: str, pages: int | Iterable[int]) -> np.ndarray:
        """Somebody needs these pages, or so many new ones, on the device: they cannot be had."""
        pages = self.allocate(pages) if isinstance(pages, int) else np.array(pages, dtype=np.int64)
        assert self.pager.hold(holder, pages)
        return pages

    def leave(self, pages: int) -> None:
        """A neighbour holds all device pages that can be had but so many."""
        self.hold("neighbour", self.pager.unpromised_pages - pages)

    def push_off(self) -> None:
        """Other content takes every device page that can be had; only what somebody holds or reads stays."""
        obtainable = self.ledger.obtainable_pages
        others = self.hold("others", obtainable)
        self.pager.forget("others")
        self.ledger.release(others)
        known = np.arange(1, self.next_page)
        stays = int((self.ledger.on_device(known) & ~self.ledger.is_held(known)).sum())
        assert stays <= self.ledger.physical_pages - self.ledger.held_pages - obtainable

    # -- the model -----------------------------------------------------------------------------------------------

    def slots_of(self, pages: Sequence[int] | np.ndarray) -> torch.Tensor:
        """Virtual slots of the tokens of these pages."""
        first = torch.from_numpy(np.array(pages, dtype=np.int64)) * self.pager.page
        return (first[:, None] + torch.arange(self.pager.page)).flatten()

    def content(self, slots: torch.Tensor) -> torch.Tensor:
        """What the model writes to these virtual slots, ``[layers, 2, tokens, heads, dim]``: their number, told apart
        by layer, key and value."""
        which = torch.arange(2 * LAYERS).view(LAYERS, 2, 1)
        heads, dim = self.pools[0][0].shape[1:]
        return (slots * 2 * LAYERS + which)[..., None, None].expand(-1, -1, -1, heads, dim)

    def places(self, slots: torch.Tensor) -> torch.Tensor:
        """Where the tokens of these virtual slots lie in the device pool."""
        page = self.pager.page
        places = self.pager.v2p[slots // page] * page + slots % page
        assert (places >= page).all(), "this needs a page that is not on the device"
        return places

    def write(self, slots: torch.Tensor | Sequence[int]) -> None:
        slots = torch.as_tensor(slots, dtype=torch.int64)
        places, content = self.places(slots), self.content(slots)
        for layer in range(LAYERS):
            for which, pool in enumerate(self.pools):
                pool[layer][places] = content[layer, which].to(pool[layer].dtype)

    def kernel(self, prefill: bool = False) -> None:
        """What is queued for the device now has run; it waited for what the pager makes it wait for, no more."""
        if self.pager.asynchronous:
            self.gpu.queue(lambda layer: None, prefill)
            self.gpu.compute_to(len(self.gpu.compute))

    def memory_at(self, places: torch.Tensor) -> torch.Tensor:
        """KV in the device pool, ``[layers, 2, tokens, heads, dim]``."""
        layers = zip(*self.pools, strict=True)
        return torch.stack([torch.stack([keys[places], values[places]]) for keys, values in layers])

    def found_at(self, places: torch.Tensor, prefill: bool = False) -> list[int]:
        """A pass reads these places of the device pool: which virtual slots it finds there."""
        assert (places >= self.pager.page).all(), "reads a page that is not on the device"
        self.kernel(prefill)
        return self.recognized(self.memory_at(places))

    def found_in_mirror(self, pages: np.ndarray) -> list[int]:
        """The same of pages of the mirror."""
        like = self.pools[0][0]
        bytes_ = self.pager.mirror.pages[torch.from_numpy(pages)]
        kv = bytes_.view(like.dtype).view(len(pages), LAYERS, 2, self.pager.page, *like.shape[1:])
        return self.recognized(kv.permute(1, 2, 0, 3, 4, 5).flatten(2, 3))

    def recognized(self, kv: torch.Tensor) -> list[int]:
        """Virtual slots of which this is the content, in every layer and in keys and values."""
        slots = (kv[0, 0, :, 0, 0] / (2 * LAYERS)).long()
        assert torch.equal(kv, self.content(slots).to(kv.dtype)), "keys and values of all layers are not of one token"
        return slots.tolist()

    def assert_content(self, page: int, tokens: int | None = None) -> None:
        """The first tokens of this page are on the device, bit by bit."""
        slots = self.slots_of([page])[:tokens]
        assert torch.equal(self.memory_at(self.places(slots)), self.content(slots).to(self.pools[0][0].dtype))


def request(
    tokens: int, prefix: Sequence[int] | np.ndarray = (), rid: str = "a", page: int = PAGE_SIZE, **lsa: object
) -> SimpleNamespace:
    """SGLang's request, as far as admission and prefill look at it; ``prefix``: pages that the radix tree has."""
    slots = torch.tensor([one * page + token for one in prefix for token in range(page)], dtype=torch.int64)
    parameters = SimpleNamespace(custom_params={"lsa": lsa} if lsa else None, max_new_tokens=10_000)
    return MadeUp(
        rid=rid,
        origin_input_ids=list(range(tokens)),
        output_ids=[],
        full_untruncated_fill_ids=list(range(tokens)),
        prefix_indices=slots,
        sampling_params=parameters,
        finished=lambda: False,
    )
