"""Pages under a pager, all of them handed out, with copies at once or later."""

from __future__ import annotations

import torch
from harness import Server
from simulated_gpu import LAYERS

PAGE, HEADS, DIM = 4, 2, 3
PHYSICAL, VIRTUAL = 4, 10


class Pages(Server):
    """Pages of an odd shape, all of them handed out; their content is random, but the same every time."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(PHYSICAL, VIRTUAL, PAGE, HEADS, DIM, dtype)
        self.allocate(VIRTUAL)
        generator = torch.Generator().manual_seed(0)
        self.random = torch.randn(LAYERS, 2, (VIRTUAL + 1) * PAGE, HEADS, DIM, generator=generator)

    def content(self, slots: torch.Tensor) -> torch.Tensor:
        return self.random[:, :, slots]

    def finish(self, copies: int) -> None:
        """So many more copies are done, oldest first, those to the mirror before those to the device."""
        stores = min(copies, len(self.gpu.storing))
        self.gpu.finish(stores, copies - stores)


def late_pages() -> Pages:
    server = Pages()
    server.late()
    return server
