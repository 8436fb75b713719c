"""attend, on a GPU: SGLang's FlashInfer backend over physical pages, decode reading resident pages and tail alone."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from flashinfer import BatchPrefillWithPagedKVCacheWrapper, BatchPrefillWithRaggedKVCacheWrapper
from sglang.srt.layers.attention import flashinfer_backend as stock
from sglang.srt.mem_cache.memory_pool import KVWriteLoc

from sglang_lsa.attend.partial import PartialPrefill, State, offsets
from sglang_lsa.attend.plan_copies import PlanCopies
from sglang_lsa.attend.shown import Shown
from sglang_lsa.attend.together import ReadTogether
from sglang_lsa.kernels.merge_shared import merge_shared
from sglang_lsa.kernels.page_table import decode_indices
from sglang_lsa.memory.transfer import upload


class LSAFlashInferBackend(stock.FlashInferAttnBackend):
    """Differs from the stock backend in which slots its plans name, and in that it shows queries to the observer.

    FlashInfer plans on the host, with lengths that must be those on the device. Both come from the resident table,
    whose two halves change in one call. ``--lsa-debug`` compares them before every decode step.
    """

    def __init__(self, model_runner, **options):
        super().__init__(model_runner, **options)
        self.lsa = model_runner.lsa
        self.copies = PlanCopies()
        self.indices_updater_decode = _DecodeUpdater(model_runner, self)
        self.indices_updater_prefill = _PrefillUpdater(model_runner, self)
        self.shown = Shown(self.lsa)
        self.partial = FlashInferParts(self)
        self.together = self._read_together() if self.lsa.groups is not None else None
        # The stock way to read new tokens beside a cached prefix leaves the prefix's scales out; this one takes them.
        self.use_paged |= self.lsa.pager.layout.scaled

    def _read_together(self) -> ReadTogether:
        updater = self.indices_updater_decode
        wrapper = partial(BatchPrefillWithPagedKVCacheWrapper, kv_layout="NHD", backend=self.decode_backend)
        shape = updater.num_qo_heads, updater.num_kv_heads, updater.head_dim
        types = updater.q_data_type, updater.data_type
        return ReadTogether(self.lsa, wrapper, self.workspace_buffer, shape, types, self.copies)

    def init_cuda_graph_state(self, max_bs, max_num_tokens, kv_indices_buf=None):
        """Buffers of the size of resident sets instead of whole contexts."""
        if kv_indices_buf is None:
            tokens = self.lsa.reserve_graph_tokens(max_bs)
            kv_indices_buf = torch.zeros(tokens, dtype=torch.int32, device=self.lsa.pager.device)
        # The stock method also allocates a mask over whole contexts, for speculative decoding, which is off.
        self.max_context_len = 1
        super().init_cuda_graph_state(max_bs, max_num_tokens, kv_indices_buf)
        self.max_context_len = self.lsa.max_context
        if self.together is not None:
            self.together.reserve(max_bs)

    def _create_decode_wrappers(self, bs, num_tokens):
        """CUDA graphs of a size, with groups and without, read one plan: the second takes the first's wrappers.
        Stock would replace them, and what the first reads would not be planned any more."""
        if self.together is not None and self.together.has_captured(bs):
            return self.decode_cuda_graph_metadata[bs]
        return super()._create_decode_wrappers(bs, num_tokens)

    def init_forward_metadata(self, forward_batch):
        super().init_forward_metadata(forward_batch)
        if self.shown.plan(forward_batch):
            self.partial.plan(list(forward_batch.extend_seq_lens_cpu))

    def forward_extend(self, q, k, v, layer, forward_batch, save_kv_cache=True):
        if not self.shown.extend(q, layer):
            out = super().forward_extend(q, k, v, layer, forward_batch, save_kv_cache)
            self.shown.attended(q, layer)
            return out
        out = self.partial.attend(q, k, v, layer)
        if save_kv_cache:
            loc = KVWriteLoc(forward_batch.out_cache_loc, None)
            self.token_to_kv_pool.set_kv_buffer(layer, loc, k, v, *self._kv_write_scales(layer))
        return out

    def forward_decode(self, q, k, v, layer, forward_batch, save_kv_cache=True):
        self.shown.decode(q, layer, forward_batch)
        if self.together is not None and self.together.reads is not None:
            out = self._decode_in_groups(self.together, q, k, v, layer, forward_batch, save_kv_cache)
        else:
            out = super().forward_decode(q, k, v, layer, forward_batch, save_kv_cache)
        self.shown.attended(q, layer)
        return out

    def _decode_in_groups(self, together: ReadTogether, q, k, v, layer, forward_batch, save_kv_cache) -> torch.Tensor:
        """As the stock method, by two attention calls: to what each request reads by itself, and to what its group
        reads."""
        if k is not None and save_kv_cache:
            loc = KVWriteLoc(forward_batch.out_cache_loc, None)
            self.token_to_kv_pool.set_kv_buffer(layer, loc, k, v, *self._kv_write_scales(layer))
        pool = self.token_to_kv_pool.get_kv_buffer(layer.layer_id)
        q = q.contiguous().view(-1, layer.tp_q_head_num, layer.head_dim)
        options = _of(layer) | {"k_scale": layer.k_scale_float, "v_scale": layer.v_scale_float}
        (wrapper,) = self.forward_metadata.decode_wrappers
        out, lse = wrapper.forward_return_lse(q, pool, **options)
        part, part_lse = together.attend(q, pool, **options)
        merge_shared(out, lse, part, part_lse, together.places[: len(q)])
        return out.view(-1, layer.tp_q_head_num * layer.head_dim)


class FlashInferParts(PartialPrefill):
    """By FlashInfer, which chooses its fastest kernels for each part; on Hopper the stock backend has it do so for new
    tokens only."""

    def __init__(self, backend: LSAFlashInferBackend):
        super().__init__(backend.lsa)
        self.backend = backend
        workspace = backend.workspace_buffer
        self.pages = BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD", backend="auto")
        self.blocks = [BatchPrefillWithRaggedKVCacheWrapper(workspace, "NHD", backend="auto") for _ in range(2)]

    @property
    def heads(self) -> tuple[int, int, int]:
        updater = self.backend.indices_updater_prefill
        return updater.num_qo_heads, updater.num_kv_heads, updater.head_dim

    def plan_own(self, lengths: Sequence[int]) -> None:
        self.new, self.q_type = _offsets(lengths), self.backend.indices_updater_prefill.q_data_type
        wrapper = self.backend.prefill_wrapper_ragged
        with self.backend.copies.planning(wrapper):
            wrapper.plan(self.new, self.new, *self.heads, q_data_type=self.q_type)

    def plan_here(self, pages: Sequence[np.ndarray], tokens: Sequence[int]) -> None:
        page = self.lsa.pager.page
        with self.backend.copies.planning(self.pages):
            self.pages.plan(
                self.new,
                _offsets([len(ids) for ids in pages]),
                upload(np.concatenate(pages).astype(np.int32), self.lsa.pager.device),
                torch.tensor([count - (len(ids) - 1) * page for ids, count in zip(pages, tokens, strict=True)]).int(),
                *self.heads,
                page,
                q_data_type=self.q_type,
                kv_data_type=self.backend.indices_updater_prefill.data_type,
            )

    def plan_blocks(self, sizes: tuple[int, int]) -> None:
        for wrapper, size in zip(self.blocks, sizes, strict=True):
            with self.backend.copies.planning(wrapper):
                wrapper.plan(self.new, _offsets([size]), *self.heads, q_data_type=self.q_type)

    def own(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer) -> State:
        return self.backend.prefill_wrapper_ragged.forward_return_lse(q, k, v, causal=True, **_of(layer))

    def here(self, q: torch.Tensor, layer) -> State:
        pool, page = self.backend.token_to_kv_pool.get_kv_buffer(layer.layer_id), self.lsa.pager.page
        paged = tuple(buffer.view(-1, page, *buffer.shape[1:]) for buffer in pool)
        # A layer may have scales though the pool is not quantised; it is divided by them only where it is.
        quantised = pool[0].dtype.itemsize == 1
        scales = {"k_scale": layer.k_scale_float, "v_scale": layer.v_scale_float} if quantised else {}
        return self.pages.forward_return_lse(q, paged, causal=False, **scales, **_of(layer))

    def block(self, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, layer, last: bool) -> State:
        return self.blocks[last].forward_return_lse(q, keys, values, causal=False, **_of(layer))


def _of(layer) -> dict[str, Any]:
    return {"sm_scale": layer.scaling, "logits_soft_cap": layer.logit_cap}


def _offsets(lengths: Sequence[int]) -> torch.Tensor:
    return torch.from_numpy(offsets(lengths))


class _DecodeUpdater(stock.FlashInferIndicesUpdaterDecode):
    _stock = inspect.signature(stock.FlashInferIndicesUpdaterDecode.call_begin_forward)

    def call_begin_forward(self, *given, **named):
        """Plan one decode step; arguments as in the stock method of the release, by name. ``seq_lens_cpu`` is needed.

        In a graph there may be more rows than requests: those that have lengths count.
        """
        asked = self._stock.bind(self, *given, **named).arguments
        wrapper, paged_kernel_lens, kv_indptr = asked["wrapper"], asked["paged_kernel_lens"], asked["kv_indptr"]
        batch = len(paged_kernel_lens)
        req_pool_indices, seq_lens_cpu = asked["req_pool_indices"][:batch], asked["seq_lens_cpu"]
        lsa = self.attn_backend.lsa
        table = lsa.step.own_table(lsa.table).table
        indptr_on_host = lsa.step.decode_indptr(lsa.table, seq_lens_cpu)
        if wrapper.is_cuda_graph_enabled:
            indices = wrapper._paged_kv_indices_buf
        else:
            indices = torch.empty(int(indptr_on_host[-1]), dtype=torch.int32, device=kv_indptr.device)
        indptr = kv_indptr[: batch + 1]
        decode_indices(
            table,
            lsa.req_to_token,
            lsa.pager.v2p,
            req_pool_indices,
            paged_kernel_lens,
            lsa.pager.page,
            indptr,
            indices,
        )
        if self.attn_backend.together is not None:
            self.attn_backend.together.plan(batch, wrapper.is_cuda_graph_enabled)
        if lsa.config.debug and not torch.equal(indptr.cpu(), indptr_on_host):
            raise RuntimeError(f"LSA: the device reads {indptr.tolist()}, the host planned {indptr_on_host.tolist()}")
        # In CUDA graphs SGLang replaced begin_forward by a plan that takes the host's lengths instead of fetching them.
        fast = getattr(wrapper.begin_forward, "func", None) == stock.fast_decode_plan
        options = {"global_override_indptr_cpu": indptr_on_host} if fast else {}
        with self.attn_backend.copies.planning(wrapper):
            wrapper.begin_forward(
                indptr,
                indices,
                self.kv_last_page_len[:batch],
                self.num_qo_heads,
                self.num_kv_heads,
                self.head_dim,
                1,
                data_type=self.data_type,
                q_data_type=self.q_data_type,
                non_blocking=True,
                fixed_split_size=asked.get("fixed_split_size"),
                disable_split_kv=bool(asked.get("disable_split_kv")),
                **options,
            )


class _PrefillUpdater(stock.FlashInferIndicesUpdaterPrefill):
    def call_begin_forward(
        self,
        wrapper_ragged,
        wrapper_paged,
        req_pool_indices,
        paged_kernel_lens,
        paged_kernel_lens_sum,
        *arguments,
        custom_kv_indices=None,
        **options,
    ):
        """Plan a prefill pass over the physical slots of all tokens; arguments as in the stock method."""
        lsa = self.attn_backend.lsa
        if lsa.step.readings is not None:
            return  # planned part by part
        # FlashInfer reads up to 256 indices past the end.
        indices = torch.zeros(paged_kernel_lens_sum + 256, dtype=torch.int32, device=req_pool_indices.device)
        indptr = torch.empty(len(req_pool_indices) + 1, dtype=torch.int32, device=req_pool_indices.device)
        decode_indices(
            lsa.everything,
            lsa.req_to_token,
            lsa.pager.v2p,
            req_pool_indices,
            paged_kernel_lens,
            lsa.pager.page,
            indptr,
            indices,
        )
        with self.attn_backend.copies.planning(wrapper_ragged, wrapper_paged):
            super().call_begin_forward(
                wrapper_ragged,
                wrapper_paged,
                req_pool_indices,
                paged_kernel_lens,
                paged_kernel_lens_sum,
                *arguments,
                custom_kv_indices=indices,
                **options,
            )
