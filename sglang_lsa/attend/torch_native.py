"""attend: the attention backend. Prefill reads everything; decode reads a request's resident pages and its tail."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from sglang.srt.mem_cache.memory_pool import KVWriteLoc
from torch.nn.functional import scaled_dot_product_attention

from sglang_lsa.engine.grouping import Grouping
from sglang_lsa.engine.observe import recent_tokens
from sglang_lsa.kernels.merge_shared import merge_shared
from sglang_lsa.kernels.merge_states import LOG2_E, merge_states
from sglang_lsa.kernels.page_table import physical_slots, resident_slots


class LSATorchBackend(TorchNativeAttnBackend):
    """SGLang's ``torch_native`` backend over physical pages.

    Unlike the stock backend it computes a chunk's own queries only, with a causal mask aligned to the end of the
    keys, where the stock backend computes a whole square of which it keeps the last rows.
    """

    def __init__(self, model_runner):
        super().__init__(model_runner)
        self.lsa = model_runner.lsa
        self.slots: list[torch.Tensor] = []
        self.pruned: list[bool] = []
        """Which requests of a decode step do not read everything."""
        self.together: list[torch.Tensor] = []
        """Slots that each group of a decode step reads for all of its members."""

    def init_forward_metadata(self, forward_batch):
        """Look up once per forward pass which slots each request reads."""
        super().init_forward_metadata(forward_batch)
        rows, lengths = forward_batch.req_pool_indices, forward_batch.seq_lens
        req_to_token = self.req_to_token_pool.req_to_token
        v2p = self.lsa.pager.v2p
        self.together = []
        if forward_batch.forward_mode.is_decode():
            table, grouping = self.lsa.step.own_table(self.lsa.table), self.lsa.step.grouping
            self.slots = resident_slots(
                table.pages, table.count, table.tail_start, req_to_token, v2p, rows, lengths, self.lsa.pager.page
            )
            self.pruned = [len(slots) < length for slots, length in zip(self.slots, lengths.tolist(), strict=True)]
            if grouping is not None:
                page = torch.arange(self.lsa.pager.page)
                self.together = [
                    (torch.from_numpy(pages)[:, None] * len(page) + page).flatten() for pages in grouping.pages
                ]
        elif self.lsa.step.readings is None:
            self.slots = [
                physical_slots(req_to_token[row, :length], v2p, self.lsa.pager.page)
                for row, length in zip(rows.tolist(), lengths.tolist(), strict=True)
            ]
        else:
            own = forward_batch.out_cache_loc.split(forward_batch.extend_seq_lens.tolist())
            self.slots = [
                torch.cat((reading.slots(self.lsa.pager.ledger.v2p), new))
                for reading, new in zip(self.lsa.step.readings, own, strict=True)
            ]

    def forward_extend(self, q, k, v, layer, forward_batch, save_kv_cache=True):
        lengths = forward_batch.extend_seq_lens.tolist()
        return self._forward(q, k, v, layer, forward_batch, save_kv_cache, lengths, [False] * len(lengths))

    def forward_decode(self, q, k, v, layer, forward_batch, save_kv_cache=True):
        return self._forward(q, k, v, layer, forward_batch, save_kv_cache, [1] * len(self.slots), self.pruned)

    def _forward(self, q, k, v, layer, forward_batch, save_kv_cache, lengths: list[int], pruned: list[bool]):
        """Attention of ``lengths[i]`` new tokens of each request ``i``; they are the last tokens of its slots."""
        pool = self.token_to_kv_pool
        if save_kv_cache and k is not None and v is not None:
            pool.set_kv_buffer(layer, KVWriteLoc(forward_batch.out_cache_loc, None), k, v)
        keys, values = pool.get_key_buffer(layer.layer_id), pool.get_value_buffer(layer.layer_id)
        q = q.reshape(-1, layer.tp_q_head_num, layer.qk_head_dim)
        self._observe(q, layer.layer_id, forward_batch, lengths)
        if self.lsa.recorder is not None:
            self.lsa.recorder.observe(layer.layer_id, q)
        if self.lsa.step.staged is not None and forward_batch.forward_mode.is_extend():
            return self._attend_streamed(q, keys, values, layer).to(q.dtype).flatten(1)
        if self.together:
            grouping = self.lsa.step.grouping
            out = attend_in_groups(q, keys, values, self.slots, self.together, grouping, pruned, layer.scaling)
            return out.flatten(1)
        out = q.new_empty((q.shape[0], layer.tp_q_head_num, layer.v_head_dim))
        start = 0
        for slots, count, some in zip(self.slots, lengths, pruned, strict=True):
            attention = attend_in_float32 if some else attend
            out[start : start + count] = attention(
                q[start : start + count],
                keys[slots],
                values[slots],
                layer.scaling,
            )
            start += count
        return out.flatten(1)

    def _attend_streamed(self, q, keys, values, layer) -> torch.Tensor:
        """Attention of one request's chunk, part by part: its own tokens, the pages in place, then those from the host.

        Returns:
            float32 ``[tokens, q_heads, head_dim]``.
        """
        (slots,) = self.slots
        here, own = slots[: -len(q)], slots[-len(q) :]
        out, lse = attend_part(q, keys[own], values[own], layer.scaling, causal=True)
        out = out.float()
        if len(here):
            merge_states(out, lse, *attend_part(q, keys[here], values[here], layer.scaling))
        for staged_keys, staged_values in self.lsa.step.staged.layer(layer.layer_id):
            merge_states(out, lse, *attend_part(q, staged_keys, staged_values, layer.scaling))
        return out

    def _observe(self, q, layer_id: int, forward_batch, lengths: list[int]) -> None:
        observer = self.lsa.observer
        if layer_id in observer.slot_of_layer:
            tokens, owners = recent_tokens(lengths, observer.positions)
            rows = forward_batch.req_pool_indices[torch.from_numpy(owners)]
            recent = torch.from_numpy(tokens)
            observer.observe(layer_id, q[recent], rows, forward_batch.positions[recent])


QUERY_BLOCK = 512
KEY_BLOCK = 512
"""Torch's CPU kernel sums over keys in blocks of this size. A call sees whole blocks, so that its sums are those of the
stock backend, which sees all keys; the mask hides those that come too late."""


def attend(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float) -> torch.Tensor:
    """Causal attention of the last ``n`` of ``length`` tokens.

    Args:
        q: ``[n, q_heads, head_dim]``.
        keys, values: ``[length, kv_heads, head_dim]``, ``length >= n``.

    Returns:
        ``[n, q_heads, head_dim]``.
    """
    n, length = q.shape[0], keys.shape[0]
    grouped = q.shape[1] != keys.shape[1]
    q, keys, values = (t.transpose(0, 1).unsqueeze(0) for t in (q, keys, values.to(q.dtype)))
    keys = keys.to(q.dtype)
    if n in (1, length):  # one query sees everything; a whole prompt is plainly causal
        out = scaled_dot_product_attention(q, keys, values, scale=scale, enable_gqa=grouped, is_causal=n > 1)
        return out.squeeze(0).transpose(0, 1)
    blocks = []
    for start in range(0, n, QUERY_BLOCK):
        stop = min(n, start + QUERY_BLOCK)
        before = length - n + start
        visible = min(length, -(-(length - n + stop) // KEY_BLOCK) * KEY_BLOCK)
        mask = torch.ones(stop - start, visible, dtype=torch.bool, device=q.device).tril_(before)
        blocks.append(
            scaled_dot_product_attention(
                q[:, :, start:stop],
                keys[:, :, :visible],
                values[:, :, :visible],
                attn_mask=mask,
                scale=scale,
                enable_gqa=grouped,
            )
        )
    return torch.cat(blocks, dim=2).squeeze(0).transpose(0, 1)


def attend_in_float32(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float) -> torch.Tensor:
    """As :func:`attend`, for what need not be rounded like stock's: for a single query in bfloat16 torch's CPU kernel
    takes several times as long."""
    return attend(q.float(), keys.float(), values.float(), scale).to(q.dtype)


def attend_in_groups(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    own: Sequence[torch.Tensor],
    together: Sequence[torch.Tensor],
    grouping: Grouping,
    pruned: Sequence[bool],
    scale: float,
) -> torch.Tensor:
    """Attention of a decode step in groups: each group's pages are read once, for the queries of all members.

    Args:
        q: ``[batch, q_heads, head_dim]``, one query of each request.
        keys, values: ``[slots, kv_heads, head_dim]``, the pool.
        own: of each request the slots that it reads by itself, int64.
        together: of each group the slots that its members read together, int64.
        pruned: of each request whether there is more than it reads.

    Returns:
        ``[batch, q_heads, head_dim]``; of a request that is in no group, what it gets where there are no groups.
    """
    out, lse = torch.empty_like(q), torch.zeros(q.shape[:2])
    for place, slots in enumerate(own):
        query = q[place : place + 1]
        if grouping.places[place] < 0:
            attention = attend_in_float32 if pruned[place] else attend
            out[place] = attention(query, keys[slots], values[slots], scale)[0]
        else:
            state = attend_part(query, keys[slots], values[slots], scale)
            out[place], lse[place] = (part[0] for part in state)
    order = torch.from_numpy(grouping.order)
    parts = [
        attend_part(q[members], keys[slots], values[slots], scale)
        for members, slots in zip(order.split(list(grouping.sizes)), together, strict=True)
    ]
    part, part_lse = (torch.cat(states) for states in zip(*parts, strict=True))
    merge_shared(out, lse, part.contiguous(), part_lse.contiguous(), torch.from_numpy(grouping.places))
    return out


def attend_part(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float, causal: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention to some of the keys, in a form that can be merged with attention to the others.

    Args:
        q: ``[n, q_heads, head_dim]``.
        keys, values: ``[m, kv_heads, head_dim]``, contiguous or not; with ``causal``, ``m`` is ``n``.

    Returns:
        ``[n, q_heads, head_dim]`` in the type of ``q``, and base-2 log-sum-exps, float32 ``[n, q_heads]``.
    """
    q, keys, values = (t.transpose(0, 1).unsqueeze(0) for t in (q, keys.to(q.dtype), values.to(q.dtype)))
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, keys, values, 0.0, causal, scale=scale)
    return out.squeeze(0).transpose(0, 1), (lse.squeeze(0).transpose(0, 1) * LOG2_E).contiguous()
