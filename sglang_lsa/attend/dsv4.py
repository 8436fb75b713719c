"""attend, for DeepSeek-V4: SGLang's sparse attention over physical pages of compressed KV, decode knowing no others."""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.layers.attention.deepseek_v4_backend import DeepseekV4AttnBackend, DSV4AttnMetadata

from sglang_lsa.kernels.compact_table import compact_table, to_physical
from sglang_lsa.kernels.page_table import physical_slots
from sglang_lsa.memory.layout.dsv4 import ENTRIES, RATIO


class LsaDeepseekV4Backend(DeepseekV4AttnBackend):
    """Differs from the stock backend in the pages that its metadata names, and in that it shows the observer what
    enters the model's own index.

    The index scores what the page table names, attention reads what the index selected, and new entries are written
    where ``c4_out_loc`` says: once these three are physical, no kernel meets a page that is not there. In decode all of
    it is made on the device, from the resident table as it is then, and recorded in CUDA graphs.
    """

    def __init__(self, model_runner, **options: Any):
        super().__init__(model_runner, **options)
        self.lsa = model_runner.lsa
        self._compile()

    def make_core_attn_metadata(
        self,
        req_to_token,
        req_pool_indices_repeated,
        seq_lens_casual,
        max_seq_len,
        out_loc,
        need_compress=True,
        is_prefill=False,
        dspark_block_size=None,
    ) -> DSV4AttnMetadata:
        """Arguments as in the stock method; every batch's metadata comes from here, in CUDA graphs and outside."""
        core = super().make_core_attn_metadata(
            req_to_token,
            req_pool_indices_repeated,
            seq_lens_casual,
            max_seq_len,
            out_loc,
            need_compress=need_compress,
            is_prefill=is_prefill,
            dspark_block_size=dspark_block_size,
        )
        if not need_compress:  # reads windows alone
            return core
        # What the stock method has derived of the virtual table, for windows and for ratio 128, stays.
        core.c4_out_loc = physical_slots(core.c4_out_loc, self.lsa.pager.v2p, ENTRIES)
        if is_prefill:
            to_physical(core.page_table, self.lsa.pager.v2p)
        else:
            self._read_resident(core, req_pool_indices_repeated)
        self.lsa.observer.begin(req_pool_indices_repeated, core.positions_casual)
        return core

    def _read_resident(self, core: DSV4AttnMetadata, rows: torch.Tensor) -> None:
        """Have a decode step's metadata name resident pages and tails, and their entries alone."""
        # Pages that a request reads are different device pages, so there are no more than the pool has.
        width = min(core.page_table.shape[1], self.lsa.pager.layout.physical_pages)
        core.page_table = core.page_table.new_empty((len(rows), width))
        compact_table(
            self.lsa.table.table,
            self.req_to_token,
            self.lsa.pager.v2p,
            rows,
            core.seq_lens_casual,
            self.page_size,
            RATIO,
            core.page_table,
            core.c4_topk_lengths_raw,
        )
        torch.clamp(core.c4_topk_lengths_raw, min=1, out=core.c4_topk_lengths_clamp1)
        torch.clamp(core.c4_topk_lengths_clamp1, max=core.c4_sparse_topk, out=core.c4_sparse_topk_lengths)

    def forward_c4_indexer(self, x, q_lora, c4_indexer, forward_batch, **options) -> None:
        layer = c4_indexer.layer_id
        if forward_batch.forward_mode.is_extend():
            self.lsa.prefill.before_layer(layer)
        if self.lsa.observer.wants_hidden(layer):
            self.lsa.observer.capture_hidden(layer, x[: len(self.forward_metadata.core_metadata.positions)])
        super().forward_c4_indexer(x=x, q_lora=q_lora, c4_indexer=c4_indexer, forward_batch=forward_batch, **options)

    def _forward_prepare_normal(self, *, c4_indexer, **given):
        return self._shown(c4_indexer.layer_id, *super()._forward_prepare_normal(c4_indexer=c4_indexer, **given))

    def _forward_prepare_multi_stream(self, *, c4_indexer, **given):
        return self._shown(c4_indexer.layer_id, *super()._forward_prepare_multi_stream(c4_indexer=c4_indexer, **given))

    def _shown(self, layer: int, q, weights):
        """What the index asks in this layer, shown to the observer on the stream that computed it."""
        if self.lsa.observer.wants_query(layer):
            self.lsa.observer.capture_index_query(layer, q, weights)
        return q, weights

    def _compile(self) -> None:
        """Run every kernel once, on padding pages and rows, so that no request waits for the compiler."""
        v2p, device = self.lsa.pager.v2p, self.lsa.pager.device
        pages, entries = (torch.zeros(shape, dtype=torch.int32, device=device) for shape in ((1, 1), (1,)))
        tables = self.lsa.table.table, self.req_to_token, v2p
        for kind in (torch.int32, torch.int64):
            rows = torch.zeros(1, dtype=kind, device=device)
            compact_table(*tables, rows, entries.clone(), self.page_size, RATIO, pages, entries)
        to_physical(pages, v2p)
        physical_slots(torch.zeros(1, dtype=torch.int64, device=device), v2p, ENTRIES)
