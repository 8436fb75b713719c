"""Staging on a GPU: what attention reads is what the mirror has, whoever copies it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sglang_lsa.memory import mirror as host_mirror
from sglang_lsa.memory.layout.mha import MhaLayout
from sglang_lsa.memory.mirror import HostMirror
from sglang_lsa.memory.staging import Staging

PAGE, LAYERS, HEADS, DIM, V_DIM = 64, 3, 2, 64, 32
PAGES = 200


@pytest.mark.parametrize("order", ["side by side", "in runs", "scattered"])
def test_blocks_are_the_pages_of_the_mirror(order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of which no two calls may have locked what one copy reads."""
    monkeypatch.setattr(host_mirror, "LOCK_AT_ONCE", 3 << 20)
    keys, values = (
        [torch.zeros(PAGE, HEADS, dim, dtype=torch.bfloat16, device="cuda") for _ in range(LAYERS)]
        for dim in (DIM, V_DIM)
    )
    layout = MhaLayout(keys, values, PAGE)
    host = HostMirror(PAGES, layout.page_bytes, pinned=True)
    mirror = host.pages
    mirror.copy_(torch.randint(0, 255, mirror.shape, dtype=torch.uint8))
    stream = torch.cuda.Stream()
    staging = Staging(layout, mirror, 32, lambda: stream, host.locked_together)
    generator = np.random.default_rng(0)
    ids = np.arange(1, PAGES + 1)
    if order == "in runs":
        ids = np.concatenate(generator.permutation(ids.reshape(-1, 50)))
    elif order == "scattered":
        ids = generator.permutation(ids)
    with torch.cuda.stream(stream):
        staged = staging.read(ids)
        seen = [[(k.clone(), v.clone()) for k, v in staged.layer(layer)] for layer in range(LAYERS)]
    torch.cuda.synchronize()
    assert {found is None for found in staged.runs} == {order == "scattered"}
    assert staging.refused == ""
    assert len(host.locked) > 2
    host.unlock()
    for layer, blocks in enumerate(seen):
        for which, piece in enumerate(layout.by_layer[layer]):
            wanted = mirror[ids, piece.offset : piece.offset + piece.nbytes].flatten()
            found = torch.cat([block[which].flatten().view(torch.uint8) for block in blocks]).cpu()
            assert torch.equal(found, wanted)
