"""An SGLang plugin of the tests: weights of the tiny DeepSeek-V4, and what makes a server show whether it is right.

``dsv4_servers`` gives it to every server, with and without LSA; LSA knows nothing of it. What it does is chosen by
variables of the environment, and everything is put in place when weights are drawn, in the process that has the model,
before there are pools and graphs:

- ``DSV4_TEST_SORTED``: torch's top-k gives its selection in the order of the context. Attention then adds up the same
  entries in the same order, whatever table they were selected through.
- ``DSV4_TEST_MASKED``: the reference for named resident sets. In decode, index logits of pages that are in no set are
  minus infinity before the top-k, so that the model selects among the others. For a server without LSA, whose
  requests name their sets as with LSA (``custom_params.lsa.sets``); only torch's top-k leaves out what is infinite, and
  only where more than its 512 entries are complete.
- ``DSV4_TEST_POISON``: a file. Device pages that are free hold bytes 0xFF, which are NaN in FP8, bfloat16 and float32
  alike, from the start on; the file holds how many were filled.
- ``DSV4_TEST_SCORES``: a file; see ``dsv4_scores``.
- ``DSV4_TEST_POOLS``: a file that gets the bytes of every part of the KV pool.
"""

from __future__ import annotations

import json
import os
import pathlib
import weakref
import zlib
from typing import Any

ENTRIES = 64
"""Of a page in the layers whose KV is paged."""
GAINS = {"down_proj": 0.1, "w2_weight": 0.1}
"""Of weights by a part of their name. Experts add little: which of them a token goes to turns on the last bit of what
came before, and in a model of drawn weights that alone would move log-probabilities by a tenth."""


def register() -> None:
    import sglang.srt.model_loader.loader as loader

    loader.initialize_dummy_weights = _draw


def _draw(model: Any, *_: Any, **__: Any) -> None:
    """The same weights in every server: what comes out of a projection is of the size of what went in."""
    import torch

    for name, weight in model.state_dict().items():
        if not torch.is_floating_point(weight) or weight.element_size() == 1:
            continue
        draw = torch.Generator(device=weight.device).manual_seed(zlib.crc32(name.encode()))
        if weight.ndim >= 2:
            weight.data.normal_(0, _gain(name) * weight.shape[-1] ** -0.5, generator=draw)
        elif "norm" in name or "scale" in name:
            weight.data.fill_(1.0)
        elif "bias" in name or "sink" in name:
            weight.data.zero_()
        else:
            weight.data.normal_(0, 0.02, generator=draw)
    _put_in_place()


def _gain(name: str) -> float:
    return next((gain for part, gain in GAINS.items() if part in name), 1.0)


def _put_in_place() -> None:
    if os.environ.get("DSV4_TEST_SORTED"):
        _sort_selections()
    if os.environ.get("DSV4_TEST_MASKED"):
        _mask_logits()
    if path := os.environ.get("DSV4_TEST_POISON"):
        _poison_free_pages(pathlib.Path(path))
    if path := os.environ.get("DSV4_TEST_SCORES"):
        from dsv4_scores import watch

        watch(pathlib.Path(path))
    if path := os.environ.get("DSV4_TEST_POOLS"):
        _weigh_pools(pathlib.Path(path))


# -- the order of what is selected -------------------------------------------------------------------------------------


def _sort_selections() -> None:
    from sglang.srt.layers.attention.dsv4 import indexer

    indexer.topk_transform_512_pytorch_vectorized = in_order(indexer.topk_transform_512_pytorch_vectorized)


def in_order(select: Any) -> Any:
    """SGLang's selection, the first entry of the context first and what is nothing last."""
    import torch

    def ordered(scores, seq_lens, page_tables, out_page_indices, page_size, out_raw_indices=None):
        raw = torch.empty_like(out_page_indices)
        select(scores, seq_lens, page_tables, out_page_indices, page_size, raw)
        order = torch.where(raw < 0, 1 << 30, raw).sort(dim=1, stable=True).indices
        out_page_indices.copy_(out_page_indices.gather(1, order))
        if out_raw_indices is not None:
            out_raw_indices.copy_(raw.gather(1, order))

    return ordered


# -- a mask instead of a smaller table ---------------------------------------------------------------------------------


class Mask:
    """Which pages each request of the current decode step may read; nothing in other passes."""

    def __init__(self) -> None:
        self.lengths: list[int] = []
        self.seen: list[tuple[int, list[int]] | None] = []
        self.hidden: Any = None

    def note(self, batch: Any) -> None:
        self.hidden, self.seen = None, []
        if batch.forward_mode.is_decode():
            self.lengths = batch.seq_lens_cpu.tolist()
            self.seen = [
                set_in_force(req.sampling_params.custom_params, length)
                for req, length in zip(batch.reqs, self.lengths, strict=True)
            ]

    def apply(self, logits: Any) -> Any:
        import torch

        if not any(self.seen):
            return logits
        if self.hidden is None:
            pages = torch.ones((len(logits), -(-logits.shape[1] // ENTRIES)), dtype=torch.bool)
            for row, seen in zip(pages, self.seen, strict=False):
                if seen is None:
                    continue
                tail_start, positions = seen
                row[:tail_start] = False
                row[positions] = True
            visible = pages.repeat_interleave(ENTRIES, dim=1)[:, : logits.shape[1]]
            # Where fewer than 512 are left, SGLang's top-k would take what lies behind the context for some of them.
            for row, tokens in zip(visible, self.lengths, strict=False):
                row[tokens // 4 :] = False
            self.hidden = ~visible.to(logits.device)
        return logits.masked_fill(self.hidden, float("-inf"))


def set_in_force(custom_params: Any, tokens: int) -> tuple[int, list[int]] | None:
    """Tail start and positions of what a request reads in a decode step of this context; None for everything."""
    found = None
    for part in filter(None, ((custom_params or {}).get("lsa") or {}).get("sets", "").split(";")):
        begins, tail_start, positions = part.split(":")
        if int(begins) <= tokens:
            found = int(tail_start), [int(page) for page in positions.split(",") if page]
    return found


def _mask_logits() -> None:
    import deep_gemm
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch

    mask = Mask()
    make, score = ForwardBatch.init_new.__func__, deep_gemm.fp8_paged_mqa_logits

    def init_new(cls, batch, *given, **options):
        mask.note(batch)
        return make(cls, batch, *given, **options)

    def masked(*given, **options):
        return mask.apply(score(*given, **options))

    ForwardBatch.init_new = classmethod(init_new)
    deep_gemm.fp8_paged_mqa_logits = masked


# -- what nobody may read ----------------------------------------------------------------------------------------------


def _poison_free_pages(path: pathlib.Path) -> None:
    import torch

    from sglang_lsa.memory.pager import Pager

    class Free(list):
        """Free device pages; whatever joins them is filled, and nothing goes on before it is."""

        def __init__(self, pages: list[int], layout: Any, filled: int = 0):
            super().__init__(pages)
            self.layout, self.filled = layout, filled
            self._fill(pages)

        def append(self, page: int) -> None:
            self.extend([page])

        def extend(self, pages: Any) -> None:
            pages = list(pages)
            super().extend(pages)
            self._fill(pages)

        def _fill(self, pages: list[int]) -> None:
            if not pages:
                return
            ids = torch.tensor(pages, device=self.layout.device)
            for piece in self.layout.pieces:
                piece.buffer.index_fill_(0, ids, 0xFF)
            torch.cuda.synchronize()
            self.filled += len(pages)
            path.write_text(str(self.filled))

    make = Pager.__init__

    def init(self, layout, *given, **options):
        make(self, layout, *given, **options)
        ledger, free_all = self.ledger, self.ledger._free_all
        ledger._free = Free(ledger._free, layout)

        def free_all_pages():
            filled = ledger._free.filled
            free_all()
            ledger._free = Free(ledger._free, layout, filled)

        ledger._free_all = free_all_pages

    Pager.__init__ = init


# -- what it weighs ----------------------------------------------------------------------------------------------------


def _weigh_pools(path: pathlib.Path) -> None:
    from sglang.srt.model_executor.model_runner import ModelRunner

    after = ModelRunner._init_post_memory_pool_components

    def init(self, *given, **options):
        pool = self.token_to_kv_pool
        sizes = {name: size for name, part in vars(pool).items() if (size := _bytes(part, set()))}
        path.write_text(json.dumps(sizes))
        return after(self, *given, **options)

    ModelRunner._init_post_memory_pool_components = init


def _bytes(thing: Any, seen: set[int]) -> int:
    """Of all tensors on a GPU that are found from here, each counted once."""
    import torch

    if isinstance(thing, weakref.ProxyTypes):
        return 0
    if isinstance(thing, torch.Tensor):
        storage = thing.untyped_storage()
        if not thing.is_cuda or storage.data_ptr() in seen:
            return 0
        seen.add(storage.data_ptr())
        return storage.nbytes()
    if isinstance(thing, dict | list | tuple):
        return sum(_bytes(part, seen) for part in (thing.values() if isinstance(thing, dict) else thing))
    if type(thing).__module__.startswith("sglang.srt.mem_cache") and hasattr(thing, "__dict__"):
        if id(thing) in seen:
            return 0
        seen.add(id(thing))
        return _bytes(vars(thing), seen)
    return 0
