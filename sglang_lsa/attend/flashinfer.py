"""attend, on a GPU: SGLang's FlashInfer backend over physical pages, decode reading resident pages and tail alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from flashinfer import BatchPrefillWithPagedKVCacheWrapper, BatchPrefillWithRaggedKVCacheWrapper
from sglang.srt.layers.attention import flashinfer_backend as stock
from sglang.srt.mem_cache.memory_pool import KVWriteLoc

from sglang_lsa.engine.observe import recent_tokens
from sglang_lsa.kernels.merge_states import merge_states
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
        self.indices_updater_decode = _DecodeUpdater(model_runner, self)
        self.indices_updater_prefill = _PrefillUpdater(model_runner, self)
        self.recent: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None
        self.partial = PartialPrefill(self)

    def init_cuda_graph_state(self, max_bs, max_num_tokens, kv_indices_buf=None):
        """Buffers of the size of resident sets instead of whole contexts."""
        if kv_indices_buf is None:
            tokens = self.lsa.reserve_graph_tokens(max_bs)
            kv_indices_buf = torch.zeros(tokens, dtype=torch.int32, device=self.lsa.pager.device)
        # The stock method also allocates a mask over whole contexts, for speculative decoding, which is off.
        self.max_context_len = 1
        super().init_cuda_graph_state(max_bs, max_num_tokens, kv_indices_buf)
        self.max_context_len = self.lsa.max_context

    def init_forward_metadata(self, forward_batch):
        super().init_forward_metadata(forward_batch)
        self.recent = None
        if forward_batch.forward_mode.is_extend() and forward_batch.extend_seq_lens_cpu is not None:
            tokens, owners = recent_tokens(list(forward_batch.extend_seq_lens_cpu), self.lsa.observer.positions)
            ids = upload(np.stack((tokens, owners)), self.lsa.pager.device)
            rows = forward_batch.req_pool_indices[ids[1]]
            self.recent = ids[0], rows, forward_batch.positions[ids[0]]
            if self.lsa.step.readings is not None:
                self.partial.plan(list(forward_batch.extend_seq_lens_cpu))

    def forward_extend(self, q, k, v, layer, forward_batch, save_kv_cache=True):
        observer = self.lsa.observer
        if self.recent is not None and layer.layer_id in observer.slot_of_layer:
            tokens, rows, positions = self.recent
            queries = q.view(-1, layer.tp_q_head_num, layer.head_dim)[tokens]
            observer.observe(layer.layer_id, queries, rows, positions)
        self.lsa.before_layer(layer.layer_id)
        if self.recent is None or self.lsa.step.readings is None:
            out = super().forward_extend(q, k, v, layer, forward_batch, save_kv_cache)
            self._record(q, layer)
            return out
        out = self.partial.attend(q, k, v, layer)
        if save_kv_cache:
            self.token_to_kv_pool.set_kv_buffer(layer, KVWriteLoc(forward_batch.out_cache_loc, None), k, v)
        return out

    def forward_decode(self, q, k, v, layer, forward_batch, save_kv_cache=True):
        observer = self.lsa.observer
        if layer.layer_id in observer.slot_of_layer:
            queries = q.view(-1, layer.tp_q_head_num, layer.head_dim)
            observer.observe(layer.layer_id, queries, forward_batch.req_pool_indices, forward_batch.positions)
        out = super().forward_decode(q, k, v, layer, forward_batch, save_kv_cache)
        self._record(q, layer)
        return out

    def _record(self, q, layer) -> None:
        if self.lsa.recorder is not None:
            self.lsa.recorder.observe(layer.layer_id, q.view(-1, layer.tp_q_head_num, layer.head_dim))


class PartialPrefill:
    """Prefill attention that reads only some of the prefix in place: part by part, merged by log-sum-exps.

    The parts of a pass are its own tokens, the pages in place, and blocks of pages from the host. Each is planned once
    for all layers, with lengths that the host knows; blocks need two plans, for all but the last are of one size.
    FlashInfer chooses its fastest kernels for each of them, which on Hopper the stock backend does for new tokens only.
    """

    def __init__(self, backend: LSAFlashInferBackend):
        self.backend, self.lsa = backend, backend.lsa
        workspace = backend.workspace_buffer
        self.here = BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD", backend="auto")
        self.whole_blocks, self.last_block = (
            BatchPrefillWithRaggedKVCacheWrapper(workspace, "NHD", backend="auto") for _ in range(2)
        )
        self.reads_here = False

    def plan(self, lengths: Sequence[int]) -> None:
        """Plan a pass that computes so many tokens of each of its requests."""
        updater, step = self.backend.indices_updater_prefill, self.lsa.step
        assert step.readings is not None
        heads = updater.num_qo_heads, updater.num_kv_heads, updater.head_dim
        own = _offsets(lengths)
        self.backend.prefill_wrapper_ragged.plan(own, own, *heads, q_data_type=updater.q_data_type)
        here = [self.lsa.pager.ledger.v2p[reading.here] for reading in step.readings]
        self.reads_here = any(map(len, here))
        if self.reads_here:
            last = [reading.tokens_here - (len(reading.here) - 1) * self.lsa.pager.page for reading in step.readings]
            self.here.plan(
                own,
                _offsets([len(pages) for pages in here]),
                upload(np.concatenate(here).astype(np.int32), self.lsa.pager.device),
                torch.tensor(last, dtype=torch.int32),
                *heads,
                self.lsa.pager.page,
                q_data_type=updater.q_data_type,
            )
        if step.staged is not None:
            sizes = step.staged.sizes
            for wrapper, size in ((self.whole_blocks, sizes[0]), (self.last_block, sizes[-1])):
                wrapper.plan(own, _offsets([size]), *heads, q_data_type=updater.q_data_type)

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer) -> torch.Tensor:
        """One layer of the pass: ``[tokens, q_heads * head_dim]`` in the type of ``q``."""
        q = q.contiguous().view(-1, layer.tp_q_head_num, layer.head_dim)
        k, v = (t.view(-1, layer.tp_k_head_num, layer.head_dim) for t in (k, v))
        options = {"sm_scale": layer.scaling, "logits_soft_cap": layer.logit_cap}
        ragged, staged = self.backend.prefill_wrapper_ragged, self.lsa.step.staged
        out, lse = ragged.forward_return_lse(q, k, v, causal=True, **options)
        out, lse = out.float(), lse.contiguous()
        if self.reads_here:
            pool = self.backend.token_to_kv_pool.get_kv_buffer(layer.layer_id)
            paged = tuple(buffer.view(-1, self.lsa.pager.page, *buffer.shape[1:]) for buffer in pool)
            merge_states(out, lse, *self.here.forward_return_lse(q, paged, causal=False, **options))
        for block, (keys, values) in enumerate(staged.layer(layer.layer_id) if staged is not None else ()):
            wrapper = self.whole_blocks if block + 1 < len(staged.sizes) else self.last_block
            merge_states(out, lse, *wrapper.forward_return_lse(q, keys, values, causal=False, **options))
        return out.to(q.dtype).view(len(q), -1)


def _offsets(lengths: Sequence[int]) -> torch.Tensor:
    """Where each of several runs begins, and the last ends: int32 ``[n + 1]`` on the host."""
    return torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)


class _DecodeUpdater(stock.FlashInferIndicesUpdaterDecode):
    def call_begin_forward(
        self,
        wrapper,
        req_pool_indices,
        paged_kernel_lens,
        paged_kernel_lens_sum,
        kv_indptr,
        kv_start_idx,
        spec_info,
        seq_lens_cpu=None,
        use_sliding_window_kv_pool=False,
        fixed_split_size=None,
        disable_split_kv=None,
    ):
        """Plan one decode step; arguments as in the stock method. ``seq_lens_cpu`` is needed."""
        lsa = self.attn_backend.lsa
        batch = len(req_pool_indices)
        indptr_on_host = lsa.step.decode_indptr(lsa.table, seq_lens_cpu)
        if wrapper.is_cuda_graph_enabled:
            indices = wrapper._paged_kv_indices_buf
        else:
            indices = torch.empty(int(indptr_on_host[-1]), dtype=torch.int32, device=kv_indptr.device)
        indptr = kv_indptr[: batch + 1]
        decode_indices(
            lsa.table.table,
            self.req_to_token,
            lsa.pager.v2p,
            req_pool_indices,
            paged_kernel_lens,
            lsa.pager.page,
            indptr,
            indices,
        )
        if lsa.config.debug and not torch.equal(indptr.cpu(), indptr_on_host):
            raise RuntimeError(f"LSA: the device reads {indptr.tolist()}, the host planned {indptr_on_host.tolist()}")
        # In CUDA graphs SGLang replaced begin_forward by a plan that takes the host's lengths instead of fetching them.
        fast = getattr(wrapper.begin_forward, "func", None) == stock.fast_decode_plan
        options = {"global_override_indptr_cpu": indptr_on_host} if fast else {}
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
            fixed_split_size=fixed_split_size,
            disable_split_kv=bool(disable_split_kv),
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
            self.req_to_token,
            lsa.pager.v2p,
            req_pool_indices,
            paged_kernel_lens,
            lsa.pager.page,
            indptr,
            indices,
        )
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
