"""Two CUDA graphs of a size: which are captured, in which order, and which of them a step replays.

SGLang's own runner captures and replays, and our attention backend plans, both with our hooks; what stands in for
FlashInfer and for CUDA graphs writes down which calls a graph has.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from read_together import HEADS, ONE, POOL, TWO, copies_on, grouping_of
from sglang.srt.model_executor.forward_batch_info import CaptureHiddenMode, ForwardMode
from sglang.srt.model_executor.runner import decode_cuda_graph_runner as stock
from sglang.srt.model_executor.runner.decode_cuda_graph_runner import DecodeCudaGraphRunner
from sglang.srt.model_executor.runner.shape_key import ShapeKey
from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

from sglang_lsa.attend import flashinfer
from sglang_lsa.attend.flashinfer import LSAFlashInferBackend
from sglang_lsa.attend.together import ReadTogether
from sglang_lsa.config import PAGE_SIZE
from sglang_lsa.engine.grouping import Grouping
from sglang_lsa.engine.step import DECODE, IDLE, Step, captured
from sglang_lsa.memory.resident_table import ResidentTable
from sglang_lsa.patches.decode_cuda_graph_runner_can_run_graph import can_run_graph
from sglang_lsa.patches.decode_cuda_graph_runner_capture_one_shape import capture_one_shape
from sglang_lsa.patches.decode_cuda_graph_runner_resolve_lora_variant import resolve_lora_variant
from sglang_lsa.patches.graph_variants import IN_GROUPS, label

pytestmark = pytest.mark.release

ROWS = 8
LAYERS = 2
APART, TOGETHER = ["own"] * LAYERS, ["own, to be merged", "groups"] * LAYERS
"""Attention calls of a graph."""


class Calls(list[str]):
    """Attention calls, in their order."""


class Decode:
    """FlashInfer's ``BatchDecodeWithPagedKVCacheWrapper`` as far as it is used."""

    made = 0

    def __init__(self, calls: Calls, *_: Any, paged_kv_indices_buffer: torch.Tensor, **others: Any):
        Decode.made += 1
        self.calls, self.plans, self.indptr = calls, 0, torch.zeros(1)
        self.is_cuda_graph_enabled = others["use_cuda_graph"]
        self._paged_kv_indices_buf = paged_kv_indices_buffer

    def begin_forward(self, indptr: torch.Tensor, *_: Any, **__: Any) -> None:
        self.plans, self.indptr = self.plans + 1, indptr.clone()

    def forward(self, q: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        self.calls.append("own")
        return q

    def forward_return_lse(self, q: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, torch.Tensor]:
        self.calls.append("own, to be merged")
        return q.clone(), torch.zeros(q.shape[:2])


class Prefill:
    """FlashInfer's ``BatchPrefillWithPagedKVCacheWrapper`` as far as it is used."""

    def __init__(self, calls: Calls, *_: Any, **__: Any):
        self.calls, self.plans = calls, 0

    def reset_workspace_buffer(self, *_: torch.Tensor) -> None:
        pass

    def plan(self, *_: Any, **__: Any) -> None:
        self.plans += 1

    def forward_return_lse(self, q: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, torch.Tensor]:
        self.calls.append("groups")
        return q.clone(), torch.zeros(q.shape[:2])


class Graphs:
    """SGLang's graph backend: of each graph, the calls that it was captured with."""

    def __init__(self, calls: Calls):
        self.calls, self.graphs = calls, dict[ShapeKey, list[str]]()

    def capture_one(self, shape_key: ShapeKey, forward_fn: Callable[[], Any], **_: Any) -> None:
        assert shape_key not in self.graphs, "captured twice"
        self.calls.clear()
        forward_fn()
        self.graphs[shape_key] = list(self.calls)

    def can_run(self, forward_batch: Any, shape_key: ShapeKey) -> bool:
        return shape_key in self.graphs


def backend(lsa: Any, calls: Calls) -> LSAFlashInferBackend:
    """Of a server that forms groups; SGLang's class as it is between its start and the capture of graphs."""
    found: Any = object.__new__(LSAFlashInferBackend)
    heads, kv_heads, dim = HEADS
    pool = [torch.zeros(((POOL + 1) * PAGE_SIZE, kv_heads, dim)) for _ in range(2)]
    updater: Any = object.__new__(flashinfer._DecodeUpdater)
    updater.__dict__ |= {
        "attn_backend": found,
        "kv_indptr": [torch.zeros(ROWS + 1, dtype=torch.int32)],
        "kv_last_page_len": torch.ones(ROWS, dtype=torch.int32),
        "num_qo_heads": heads,
        "num_kv_heads": kv_heads,
        "head_dim": dim,
        "data_type": torch.float32,
        "q_data_type": torch.float32,
        "update": updater.update_single_wrapper,
    }
    found.__dict__ |= {
        "lsa": lsa,
        "workspace_buffer": torch.zeros(1),
        "num_wrappers": 1,
        "decode_backend": "fa2",
        "decode_use_tensor_cores": True,
        "decode_uses_dequant_workspace": False,
        "disable_cuda_graph_kv_split": False,
        "use_sliding_window_kv_pool": False,
        "kv_indptr": updater.kv_indptr,
        "kv_last_page_len": updater.kv_last_page_len,
        "cuda_graph_kv_indices": [torch.zeros(4096, dtype=torch.int32)],
        "decode_cuda_graph_metadata": {},
        "indices_updater_decode": updater,
        "token_to_kv_pool": SimpleNamespace(get_kv_buffer=lambda layer: pool),
        "shown": SimpleNamespace(decode=lambda *_: None, attended=lambda *_: None),
        "copies": copies_on(torch.device("cpu")),
        "together": None,
    }
    if lsa.groups is not None:
        types = torch.float32, torch.float32
        found.together = ReadTogether(lsa, lambda *_, **__: Prefill(calls), torch.zeros(1), HEADS, types, found.copies)
    return found


class Runner(DecodeCudaGraphRunner):
    """SGLang's, with our hooks, over a model that is attention alone."""

    def __init__(self, sizes: list[int], groups: bool, lora: bool = False):
        table = ResidentTable(ROWS, 8, PAGE_SIZE)
        pager = SimpleNamespace(
            page=PAGE_SIZE,
            v2p=torch.arange(64, dtype=torch.int32),
            device=torch.device("cpu"),
            ledger=SimpleNamespace(physical_pages=POOL),
        )
        self.lsa: Any = SimpleNamespace(
            step=IDLE,
            groups=SimpleNamespace(planning_bytes=0) if groups else None,
            table=table,
            pager=pager,
            req_to_token=torch.zeros((ROWS, 1024), dtype=torch.int32),
            config=SimpleNamespace(debug=True),
        )
        self.calls, self.lora = Calls(), lora
        self.attn_backend = backend(self.lsa, self.calls)
        self.backend = Graphs(self.calls)
        self.model_runner = SimpleNamespace(
            lsa=self.lsa,
            attn_backend=self.attn_backend,
            canary_manager=None,
            capture_head_hooks=[],
            capture_tail_hooks=[],
            device="cpu",
            gpu_id=0,
            hisparse_coordinator=None,
            lora_manager=None,
            model=SimpleNamespace(forward=self.forward),
            server_args=SimpleNamespace(debug_cuda_graph=False, enable_lora=False),
            tp_group=None,
            spec_algorithm=SpeculativeAlgorithm.NONE,
            is_draft_worker=False,
        )
        self.record_nolora_graph = lora
        self.capture_bs, self.compile_bs, self.max_bs, self.captured_req_width = sizes, [], max(sizes), 1
        self.disable_padding, self.is_encoder_decoder, self.ragged_verify_mode = True, False, False
        self.require_mlp_tp_gather = self.require_mlp_sync = self.enable_two_batch_overlap = False
        self.enable_pdmux, self.pp_size, self.dp_size, self.is_dllm = False, 1, 1, False
        self.attention_graph_variants = self.dllm_attention = self.dllm_input_preparation = None
        self.dllm_uses_input_embeds = False
        self.capture_hidden_mode, self.seq_len_fill_value = CaptureHiddenMode.NULL, 1
        self.capture_forward_mode = ForwardMode.DECODE
        self.tbo_plugin = SimpleNamespace(capture_one_batch_size=lambda *_, **__: None)
        self.deepep_adapter = SimpleNamespace(capture=lambda **_: None, replay=lambda: None)
        self.device_module = SimpleNamespace(is_current_stream_capturing=lambda: False)
        self.buffers = SimpleNamespace(num_token_non_padded=None)
        self.buffer_registry = SimpleNamespace(fill_from=lambda *_, **__: None)
        self.captured_as: list[tuple[int, str | None]] = []

    def capture_one_shape(self, *arguments: Any) -> None:
        def original(*given: Any) -> None:
            self.captured_as.append((given[1], given[4]))
            DecodeCudaGraphRunner.capture_one_shape(*given)

        capture_one_shape(original, self, *arguments)

    def _resolve_lora_variant(self, forward_batch: Any) -> str | None:
        return resolve_lora_variant(super()._resolve_lora_variant(forward_batch), self, forward_batch)

    def can_run_graph(self, forward_batch: Any) -> bool:
        return can_run_graph(super().can_run_graph(forward_batch), self, forward_batch)

    def capture_prepare(self, size: int, **_: Any) -> tuple[Any, Any, None]:
        return self.batch(size), self.attn_backend, None

    def _init_replay_attn_metadata(self, forward_batch: Any, *, bs: int, **_: Any) -> None:
        """0.5.23; in 0.5.17 it is a part of ``load_batch``."""
        self.attn_backend.init_forward_metadata_out_graph(self.batch(bs))

    def batch(self, size: int) -> Any:
        """Of so many requests with one token each."""
        return SimpleNamespace(
            batch_size=size,
            capture_hidden_mode=CaptureHiddenMode.NULL,
            dp_padding_mode=SimpleNamespace(is_max_len=lambda: True),
            encoder_lens=None,
            forward_mode=ForwardMode.DECODE,
            global_dp_buffer_len=None,
            global_num_tokens_cpu=None,
            input_ids=torch.zeros(size, dtype=torch.int64),
            kv_loc_plan=None,
            lora_ids=None,
            needs_forward_metadata_init=lambda: True,
            out_cache_loc=None,
            positions=torch.zeros(size, dtype=torch.int64),
            replace_embeds=None,
            req_pool_indices=torch.zeros(size, dtype=torch.int64),
            seq_lens=torch.ones(size, dtype=torch.int64),
            seq_lens_cpu=torch.ones(size, dtype=torch.int64),
            seq_lens_sum=size,
            spec_info=None,
        )

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor, forward_batch: Any) -> None:
        layer = SimpleNamespace(
            layer_id=0,
            tp_q_head_num=HEADS[0],
            head_dim=HEADS[2],
            scaling=1.0,
            logit_cap=0.0,
            k_scale_float=None,
            v_scale_float=None,
            is_cross_attention=False,
        )
        for _ in range(LAYERS):
            q = torch.zeros((len(input_ids), HEADS[0] * HEADS[2]))
            self.attn_backend.forward_decode(q, None, None, layer, forward_batch)

    def step(self, grouping: Grouping | None, size: int) -> list[str]:
        """The calls of the graph that a decode step of so many requests replays."""
        self.lsa.step = Step(kind=DECODE, grouping=grouping)
        batch = self.batch(size)
        assert self.can_run_graph(batch)
        self.load_batch(batch)
        together = self.attn_backend.together
        planned = together is not None and together.reads is not None
        calls = self.backend.graphs[self._replay_graph_key]
        assert ("groups" in calls) == planned, "the graph that is replayed is not the one that was planned"
        return calls


@pytest.fixture
def captured_runner(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Runner]:
    """Makes a runner whose graphs are captured."""

    def fast_decode_plan(wrapper: Decode, *given: Any, **named: Any) -> None:
        assert "global_override_indptr_cpu" in named, "the host would wait for the device"
        Decode.begin_forward(wrapper, *given, **named)

    monkeypatch.setattr(flashinfer.stock, "fast_decode_plan", fast_decode_plan, raising=False)
    for name in ("set_dp_buffer_len", "set_is_extend_in_batch", "_set_capture_lora_variant"):
        monkeypatch.setattr(stock, name, lambda *_: None, raising=False)
    monkeypatch.setattr(stock, "get_available_gpu_memory", lambda *_, **__: 0.0)
    graph = SimpleNamespace(debug_cuda_graph=False)
    monkeypatch.setattr(stock, "get_exec", lambda: SimpleNamespace(graph=graph), raising=False)
    monkeypatch.setattr(stock, "get_parallel", lambda: SimpleNamespace(tp_rank=1, tp_group=None))
    monkeypatch.setattr(stock, "forward_context", lambda *_, **__: nullcontext())
    monkeypatch.setattr(stock, "build_replay_fb_view", lambda forward_batch, bs, **_: runners[-1].batch(bs))
    runners: list[Runner] = []

    def make(sizes: list[int], groups: bool = True, **options: Any) -> Runner:
        runner = Runner(sizes, groups, **options)
        runners.append(runner)
        monkeypatch.setattr(
            flashinfer.stock,
            "BatchDecodeWithPagedKVCacheWrapper",
            lambda *given, **named: Decode(runner.calls, *given, **named),
            raising=False,  # SGLang imports FlashInfer where there is a GPU
        )
        runner._capture_one_stream()
        return runner

    return make


def test_capture_order(captured_runner: Callable[..., Runner]) -> None:
    """Larger sizes first, and of each size the one with more calls: what it leaves is enough for the other."""
    runner = captured_runner([1, 2, 4])
    assert runner.captured_as == [(4, IN_GROUPS), (4, None), (2, IN_GROUPS), (2, None), (1, None)]
    calls = {(key.size, key.variant_label): calls for key, calls in runner.backend.graphs.items()}
    assert calls == {
        (4, IN_GROUPS): TOGETHER,
        (4, None): APART,
        (2, IN_GROUPS): TOGETHER,
        (2, None): APART,
        (1, None): APART,
    }
    assert runner.lsa.step is IDLE


def test_without_groups_graphs_are_what_they_were(captured_runner: Callable[..., Runner]) -> None:
    runner = captured_runner([1, 2, 4], groups=False)
    assert runner.captured_as == [(4, None), (2, None), (1, None)]
    assert set(map(tuple, runner.backend.graphs.values())) == {tuple(APART)}
    assert runner.step(None, 4) == APART


def test_which_graph_is_replayed(captured_runner: Callable[..., Runner]) -> None:
    """That with calls if a row of the batch is in a group, and that without otherwise, whatever was before."""
    runner, one, two = captured_runner([1, 2, 4, 5, 8]), grouping_of(ONE, 5), grouping_of(TWO, 5)
    steps = [(None, 5, APART), (one, 5, TOGETHER), (one, 5, TOGETHER), (two, 5, TOGETHER), (None, 5, APART)]
    steps += [(None, 4, APART), (one, 4, TOGETHER), (None, 1, APART), (None, 8, APART), (two, 8, TOGETHER)]
    for grouping, size, calls in steps:
        assert runner.step(grouping, size) == calls


def test_windows_that_begin_and_end(captured_runner: Callable[..., Runner]) -> None:
    """A set changes, and with it who reads together: the same requests go from one graph to the other and back; what
    is read together is planned where it changed, and what each reads by itself in every step."""
    runner = captured_runner([4])
    together, (own,) = runner.attn_backend.together, runner.attn_backend.decode_cuda_graph_metadata[4]
    assert together is not None
    groups, window = together.graphs[4], grouping_of([((0, 1), [3])], 4)
    captured_plans = groups.plans, own.plans
    seen = []
    for grouping in (None, window, window, None, window, grouping_of([((0, 1), [5])], 4), None):
        runner.step(grouping, 4)
        seen.append((groups.plans - captured_plans[0], own.plans - captured_plans[1]))
    assert seen == [(0, 1), (1, 2), (1, 3), (1, 4), (1, 5), (2, 6), (2, 7)]


def test_both_graphs_of_a_size_read_one_plan(captured_runner: Callable[..., Runner]) -> None:
    """SGLang makes wrappers at every capture; those that replay has would be the second's, and plan it alone."""
    Decode.made = 0
    runner = captured_runner([1, 2, 4])
    assert Decode.made == 3
    assert [own.plans for (own,) in runner.attn_backend.decode_cuda_graph_metadata.values()] == [2, 2, 1]


def test_graphs_that_are_captured_anew_have_new_wrappers(captured_runner: Callable[..., Runner]) -> None:
    runner = captured_runner([2])
    (before,) = runner.attn_backend.decode_cuda_graph_metadata[2]
    runner.backend.graphs.clear()
    runner._capture_one_stream()
    assert runner.attn_backend.decode_cuda_graph_metadata[2][0] is not before
    assert runner.step(grouping_of([((0, 1), [3])], 2), 2) == TOGETHER


def test_a_size_without_a_graph_is_run_without_one(captured_runner: Callable[..., Runner]) -> None:
    runner = captured_runner([2, 4])
    for grouping in (None, grouping_of(ONE, 5)):
        runner.lsa.step = Step(kind=DECODE, grouping=grouping)
        assert not runner.can_run_graph(runner.batch(3))
        assert runner.can_run_graph(runner.batch(4))
        runner.lsa.step = runner.lsa.step._replace(fits_graph=False)
        assert not runner.can_run_graph(runner.batch(4))


def test_variants_of_lora_stay_apart(captured_runner: Callable[..., Runner]) -> None:
    runner = captured_runner([2], lora=True)
    assert [variant for _, variant in runner.captured_as] == [
        "lora, lsa-groups",
        "lora",
        "nolora, lsa-groups",
        "nolora",
    ]
    assert runner.step(None, 2) == APART
    assert runner._replay_graph_key.variant_label == "nolora"


def test_a_failed_capture_leaves_no_step(captured_runner: Callable[..., Runner]) -> None:
    runner = captured_runner([2])

    def fails(*_: Any) -> None:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        capture_one_shape(fails, runner, 2, None)
    assert runner.lsa.step is IDLE


def test_what_is_captured() -> None:
    assert captured(1, groups=True) == captured(64, groups=False) == (IDLE,)
    first, second = captured(2, groups=True)
    assert first.reads_together and not second.reads_together
    assert first._replace(captures_groups=False) == second == IDLE


def test_labels() -> None:
    assert [label(None, False), label("lora", False)] == [None, "lora"]
    assert [label(None, True), label("lora", True)] == ["lsa-groups", "lora, lsa-groups"]
