"""A request that loses its place while its first pass is running changes no answer, its own included.

SGLang's own classes, as released, work on the result of a prefill; around them are the hooks that a server installs.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from release import RELEASE

from sglang_lsa.patches.scheduler_batch_result_processor_process_batch_result_prefill import keep_logprobs_in_step
from sglang_lsa.patches.scheduler_output_streamer_stream_output import stream_output

pytest.importorskip("sglang.srt.managers.schedule_batch")
from sglang.srt import runtime_context
from sglang.srt.disaggregation.utils import DisaggregationMode
from sglang.srt.layers.logits_processor import LogitsProcessorOutput
from sglang.srt.managers.schedule_batch import Req
from sglang.srt.managers.scheduler_components import batch_result_processor, logprob_result_processor, output_streamer
from sglang.srt.managers.utils import GenerationBatchResult
from sglang.srt.model_executor.forward_batch_info import CaptureHiddenMode
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

VOCABULARY = 100


class Scheduler:
    """What handles results in SGLang's scheduler, with our hooks or without them.

    Attributes:
        told: tokens and logarithmic probabilities that the detokenizer was sent, by request.
        prompts: logarithmic probabilities of prompts that it was sent, by request.
    """

    def __init__(self, hooks: bool = True):
        self.told: dict[str, tuple[list[int], list[float]]] = {}
        self.prompts: dict[str, list[float | None]] = {}
        self.streamer = output_streamer.SchedulerOutputStreamer(
            send_to_detokenizer=SimpleNamespace(send_output=self._take),
            tree_cache=SimpleNamespace(),
            **({} if RELEASE.checkpoints else {"ps": SimpleNamespace(dp_rank=0, attn_tp_rank=0)}),
            server_args=SimpleNamespace(),
            is_generation=True,
            spec_algorithm=SpeculativeAlgorithm.NONE,
            disaggregation_mode=DisaggregationMode.NULL,
            enable_hicache_storage=lambda: False,
        )
        self.hooks = hooks
        stream: Callable[..., None] = partial(type(self.streamer).stream_output, self.streamer)
        if hooks:
            stream = partial(stream_output, type(self.streamer).stream_output, self.streamer)
        names = batch_result_processor.SchedulerBatchResultProcessor.__dataclass_fields__
        self.processor = batch_result_processor.SchedulerBatchResultProcessor(
            **{name: MagicMock() for name in names}
            | {
                "is_generation": True,
                "enable_overlap": True,
                "model_config": MagicMock(self_opened_think_start_ids=None),
                "logprob_result_processor": logprob_result_processor.SchedulerLogprobResultProcessor(
                    model_config=SimpleNamespace(vocab_size=VOCABULARY)
                ),
                "output_streamer": SimpleNamespace(stream_output=stream),
            }
            | ({"server_args": SimpleNamespace()} if "server_args" in names else {})
        )

    def _take(self, payload: Any) -> None:
        for place, rid in enumerate(payload.rids):
            tokens, chances = self.told.setdefault(rid, ([], []))
            tokens += payload.output_ids[place]
            chances += payload.output_token_logprobs_val[place]
            if payload.input_token_logprobs_val[place]:
                self.prompts[rid] = payload.input_token_logprobs_val[place]

    def prefill(self, *reqs: Req) -> None:
        """The result of a pass in which every prompt was prefilled whole; its answer begins with the token 50.

        Row ``j`` of the ``i``-th prompt has the logarithmic probability ``-(10 i + j)``.
        """
        rows = [-(10.0 * place + row) for place, req in enumerate(reqs) for row in range(len(req.origin_input_ids))]
        result = GenerationBatchResult(
            logits_output=LogitsProcessorOutput(
                next_token_logits=None,
                next_token_logprobs=torch.full((len(reqs),), -0.5),
                input_token_logprobs=torch.tensor(rows),
            ),
            next_token_ids=torch.full((len(reqs),), 50),
            can_run_cuda_graph=False,
            extend_input_len_per_req=[len(req.origin_input_ids) for req in reqs],
            extend_logprob_start_len_per_req=[0] * len(reqs),
        )
        batch = SimpleNamespace(
            reqs=list(reqs),
            return_logprob=True,
            return_hidden_states=False,
            return_hidden_states_mode=CaptureHiddenMode.NULL,
            spec_info=None,
            decoding_reqs=None,
            prefill_stats=None,
            dp_cooperation_info=None,
        )
        if self.hooks:
            keep_logprobs_in_step(self.processor, batch, result)
        self.processor.process_batch_result_prefill(batch, result)


class Unset:
    """Arguments of which none is set, in groups of any name."""

    def __getattr__(self, name: str) -> Unset:
        return self

    def __bool__(self) -> bool:
        return False


@pytest.fixture(autouse=True)
def _serving(monkeypatch: pytest.MonkeyPatch) -> None:
    if RELEASE.checkpoints:  # all others that SGLang asks for
        monkeypatch.setattr(runtime_context.RuntimeContext, "config_bag", lambda self, name: Unset())
        monkeypatch.setattr(output_streamer, "get_parallel", lambda: SimpleNamespace(dp_rank=0, attn_tp_rank=0))
    serving = SimpleNamespace(stream_interval=1, weight_version=None)
    monkeypatch.setattr(output_streamer, "get_serving", lambda: serving)
    observability = SimpleNamespace(enable_request_time_stats_logging=False, enable_metrics=False)
    monkeypatch.setattr(output_streamer, "get_observability", lambda: observability)
    checkpoint = "checkpoint_kv_cache" if RELEASE.checkpoints else "maybe_cache_unfinished_req"
    monkeypatch.setattr(batch_result_processor, checkpoint, lambda req, tree: None)
    features = SimpleNamespace(features=SimpleNamespace(enable_mis=False))
    monkeypatch.setattr(logprob_result_processor, "get_exec", lambda: features)
    memory = SimpleNamespace(enable_hisparse=False)
    monkeypatch.setattr(batch_result_processor, "get_memory", lambda: memory)


def prompt(rid: str, tokens: int, stream: bool = False) -> Req:
    sampling = SamplingParams(max_new_tokens=8, ignore_eos=True)
    sampling.normalize(None)
    req = Req(rid, "", array("q", range(tokens)), sampling, return_logprob=True, stream=stream, vocab_size=VOCABULARY)
    req.logprob_start_len = 0
    req.tokenizer = MagicMock()
    return req


def decoded(req: Req, token: int) -> None:
    req.output_ids.append(token)
    req.logprob.output_token_logprobs_val.append(-1.0)
    req.logprob.output_token_logprobs_idx.append(token)


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_that_lost_its_place_loses_no_logprob(stream: bool) -> None:
    scheduler = Scheduler()
    lost = prompt("lost", 3, stream)
    lost.reset_for_retract()
    scheduler.prefill(lost)
    assert "lost" not in scheduler.told, "it has nothing to tell yet"
    lost.is_retracted = False
    scheduler.prefill(lost)
    for token in range(51, 58):
        decoded(lost, token)
    lost.update_finish_state()
    assert lost.finished()
    scheduler.streamer.stream_output([lost], True)
    assert scheduler.told["lost"] == ([*range(50, 58)], [-0.5, *[-1.0] * 7])


def test_prompt_logprobs_are_of_this_prompt() -> None:
    scheduler = Scheduler()
    first, lost, last = prompt("first", 4, True), prompt("lost", 3, True), prompt("last", 5, True)
    lost.reset_for_retract()
    scheduler.prefill(first, lost, last)
    assert scheduler.prompts["first"] == [None, -0.0, -1.0, -2.0]
    assert scheduler.prompts["last"] == [None, -20.0, -21.0, -22.0, -23.0]
    lost.is_retracted = False
    scheduler.prefill(lost)
    assert scheduler.prompts["lost"] == [None, -0.0, -1.0]


def test_sglang_still_needs_both() -> None:
    """Where this fails, SGLang's own classes have learned it, and the hooks can go; 0.5.23 has learned the first."""
    scheduler = Scheduler(hooks=False)
    lost, last = prompt("lost", 3, True), prompt("last", 5, True)
    lost.reset_for_retract()
    scheduler.prefill(lost, last)
    assert scheduler.told["lost"] == ([], [])
    assert lost.send_output_token_logprobs_offset == (0 if RELEASE.checkpoints else 1)
    assert scheduler.prompts["last"] == [None, -0.0, -1.0, -2.0, -10.0]
