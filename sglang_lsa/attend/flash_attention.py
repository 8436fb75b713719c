"""attend, on Hopper: SGLang's FlashAttention-3 backend over physical pages, which need no lengths on the host."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from sglang.srt.layers.attention.flashattention_backend import FlashAttentionBackend
from sglang.srt.mem_cache.memory_pool import KVWriteLoc

from sglang_lsa.attend.partial import PartialPrefill, State, offsets
from sglang_lsa.attend.shown import Shown
from sglang_lsa.kernels.merge_states import base_2
from sglang_lsa.kernels.page_table import decode_pages
from sglang_lsa.memory.transfer import upload


class LSAFlashAttentionBackend(FlashAttentionBackend):
    """Differs from the stock backend in the pages that its tables name, and in that it shows queries to the observer.

    A decode step's table and lengths are made on the device, from the resident table as it is then; nothing is planned
    on the host, and a CUDA graph has room for every step.
    """

    def __init__(self, model_runner):
        super().__init__(model_runner)
        self.lsa = model_runner.lsa
        self.shown = Shown(self.lsa)
        self.partial = FlashAttentionParts(self)

    def init_forward_metadata(self, forward_batch):
        super().init_forward_metadata(forward_batch)
        reads_a_part = self.shown.plan(forward_batch)
        if reads_a_part:
            self.partial.plan(list(forward_batch.extend_seq_lens_cpu))
            return
        metadata, rows = self.forward_metadata, forward_batch.req_pool_indices
        decode = forward_batch.forward_mode.is_decode_or_idle()
        table = self.lsa.table.table if decode else self.lsa.everything
        metadata.page_table = torch.zeros_like(metadata.page_table, dtype=torch.int32)
        self._read(table, rows, forward_batch.seq_lens, metadata)
        if decode:
            width = metadata.page_table.shape[1] * self.page_size
            metadata.scheduler_metadata = self._compute_scheduler_metadata(
                len(rows), width, metadata.cache_seqlens_int32, metadata.cu_seqlens_q
            )

    def _apply_cuda_graph_metadata(self, bs, req_pool_indices, seq_lens, *arguments, **options):
        """What a decode graph reads, before it is captured and before each replay; arguments as in the stock method."""
        metadata = self.decode_cuda_graph_metadata[bs]
        metadata.max_seq_len_k = self.max_context_len  # how the graph's own kernels were split
        self._read(self.lsa.table.table, req_pool_indices[:bs], seq_lens[:bs], metadata)
        if metadata.scheduler_metadata is not None:
            found = self._compute_scheduler_metadata(
                bs, metadata.max_seq_len_k, metadata.cache_seqlens_int32, metadata.cu_seqlens_q
            )
            self._sched_meta_buf[: len(found)] = found
            self._sched_meta_buf[len(found) :] = 0
        self.forward_metadata = metadata
        self.forward_metadata_spec_decode_expand = None

    def _read(self, table: torch.Tensor, rows: torch.Tensor, seq_lens: torch.Tensor, metadata) -> None:
        """Have ``metadata`` name the physical pages that ``table`` says, and their tokens."""
        pages, lengths = metadata.page_table, metadata.cache_seqlens_int32
        decode_pages(table, self.req_to_token, self.lsa.pager.v2p, rows, seq_lens, self.page_size, pages, lengths)

    def forward_extend(self, q, k, v, layer, forward_batch, save_kv_cache=True, **options):
        if self.shown.extend(q, layer):
            out = self.partial.attend(q, k, v, layer)
            if save_kv_cache:  # which divides k and v by their scales, where they are
                loc = KVWriteLoc(forward_batch.out_cache_loc, None)
                self.token_to_kv_pool.set_kv_buffer(layer, loc, k, v, layer.k_scale, layer.v_scale)
            return out
        out = super().forward_extend(q, k, v, layer, forward_batch, save_kv_cache, **options)
        self.shown.attended(q, layer)
        return out.to(q.dtype)  # of KV in FP8 it is bfloat16, whatever the model computes in

    def forward_decode(self, q, k, v, layer, forward_batch, save_kv_cache=True, **options):
        self.shown.decode(q, layer, forward_batch)
        out = super().forward_decode(q, k, v, layer, forward_batch, save_kv_cache, **options)
        self.shown.attended(q, layer)
        return out.to(q.dtype)


class FlashAttentionParts(PartialPrefill):
    """By FlashAttention-3's kernels, which read KV in FP8 as it lies; queries and new tokens then are FP8, too, as with
    the stock backend."""

    def __init__(self, backend: LSAFlashAttentionBackend):
        super().__init__(backend.lsa)
        self.backend = backend
        self.reads_raw = backend.kv_cache_dtype.itemsize == 1

    def plan_own(self, lengths: Sequence[int]) -> None:
        self.new = upload(offsets(lengths), self.lsa.pager.device)
        self.longest = max(lengths)

    def plan_here(self, pages: Sequence[np.ndarray], tokens: Sequence[int]) -> None:
        table = np.zeros((len(pages), max(map(len, pages))), dtype=np.int32)
        for row, ids in zip(table, pages, strict=True):
            row[: len(ids)] = ids
        self.pages = upload(table, self.lsa.pager.device)
        self.tokens = upload(np.array(tokens, dtype=np.int32), self.lsa.pager.device)

    def plan_blocks(self, sizes: tuple[int, int]) -> None:
        # A block is read by one request: see Reading.
        self.blocks = [(upload(offsets([size]), self.lsa.pager.device), size) for size in sizes]

    def own(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer) -> State:
        if self.reads_raw:
            of_keys, of_values = self.lsa.pager.layout.scales(layer.layer_id)
            k, v = ((t / scale).to(self.backend.kv_cache_dtype) for t, scale in ((k, of_keys), (v, of_values)))
        return self._keys_at_hand(q, k, v, layer, self.new, self.longest, causal=True)

    def here(self, q: torch.Tensor, layer) -> State:
        backend = self.backend
        keys, values = (
            buffer.view(-1, backend.page_size, *buffer.shape[1:])
            for buffer in backend.token_to_kv_pool.get_kv_buffer(layer.layer_id)
        )
        out, lse, *_ = backend.flash_attn_with_kvcache(
            q=self._as_kept(q),
            k_cache=keys,
            v_cache=values,
            page_table=self.pages,
            cache_seqlens=self.tokens,
            cu_seqlens_q=self.new,
            max_seqlen_q=self.longest,
            causal=False,
            return_softmax_lse=True,
            **self._of(layer, len(self.tokens)),
        )
        return out, base_2(lse)

    def block(self, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, layer, last: bool) -> State:
        return self._keys_at_hand(q, keys, values, layer, *self.blocks[last], causal=False)

    def _keys_at_hand(self, q, keys, values, layer, begins: torch.Tensor, longest: int, causal: bool) -> State:
        out, lse, *_ = self.backend.flash_attn_varlen_func(
            q=self._as_kept(q),
            k=keys,
            v=values,
            cu_seqlens_q=self.new,
            cu_seqlens_k=begins,
            max_seqlen_q=self.longest,
            max_seqlen_k=longest,
            causal=causal,
            return_softmax_lse=True,
            **self._of(layer, len(begins) - 1),
        )
        return out, base_2(lse)

    def _as_kept(self, q: torch.Tensor) -> torch.Tensor:
        return q.to(self.backend.kv_cache_dtype) if self.reads_raw else q

    def _of(self, layer, requests: int) -> dict[str, Any]:
        scales = {}
        if self.reads_raw and layer.k_scale is not None:
            shape = (requests, layer.tp_k_head_num)
            scales = {"k_descale": layer.k_scale.expand(shape), "v_descale": layer.v_scale.expand(shape)}
        return {
            "softmax_scale": layer.scaling,
            "softcap": layer.logit_cap,
            "num_splits": self.backend.num_splits,
            **scales,
        }
