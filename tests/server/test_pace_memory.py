"""A prompt that waits for decode steps between its chunks keeps what it was promised, and costs nobody an answer."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from prompts import random_ids
from serving import assert_idle, is_busy
from soak import FLAGS, LSA_CONFIG

from sglang_lsa.server_process import LSA, ServerProcess

pytestmark = [pytest.mark.server, pytest.mark.release]


@pytest.fixture(scope="module")
def tight(model_path: str, logs: pathlib.Path) -> Iterator[ServerProcess]:
    """32 pages on the device, about 110 on the host. SGLang expects answers to be short, as it does after a while."""
    config = logs / "tight.json"
    config.write_text(json.dumps({**LSA_CONFIG, "host_memory_gb": 0.06, "debug": True, "disable_view": True}))
    flags = ["--model-path", model_path, *FLAGS, "--schedule-conservativeness", "0.1", "--lsa-config", str(config)]
    with ServerProcess(LSA, flags, logs / "tight.log") as server:
        yield server.wait_until_ready()


def answer(server: ServerProcess, ids: list[int], tokens: int, **lsa: object) -> int:
    """How many tokens it has."""
    sampling = {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True, "custom_params": {"lsa": lsa}}
    return len(server.post("/generate", {"input_ids": ids, "sampling_params": sampling})["output_ids"])


@pytest.mark.parametrize(
    ("bound", "first", "then", "options"),
    [
        pytest.param(8, (600, 1000), (5700, 4), {}, id="host"),
        pytest.param(2, (600, 700), (1100, 4), {"enabled": False}, id="device"),
    ],
)
def test_memory_for_the_next_chunk(
    tight: ServerProcess, bound: int, first: tuple[int, int], then: tuple[int, int], options: dict[str, object]
) -> None:
    """Those that decode would take what the rest of the prompt needs, or be ended for want of what it holds."""
    tight.post("/lsa/config", {"prefill_tokens_per_step": bound, "prefill_burst_tokens": 0})
    with ThreadPoolExecutor(2) as pool:
        decoding = pool.submit(answer, tight, random_ids(first[0], bound), first[1], **options)
        while not is_busy(tight):
            pass
        waiting = pool.submit(answer, tight, random_ids(then[0], 10 + bound), then[1], **options)
        assert (decoding.result(), waiting.result()) == (first[1], then[1])
    assert_idle(tight)
