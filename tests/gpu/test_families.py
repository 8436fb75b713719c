"""Families of models on a GPU, beside stock SGLang with the same attention backend: read whole, streamed, and pruned.

Stock serves every family, too: it shares no attention with LSA, where a request that switches LSA off would. Servers
take most of a minute to start, nearly all of it one core's, so those of the next families start while one is tested.
"""

from __future__ import annotations

import importlib
import pathlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from families import FAMILIES, SMALL, Answered, ask, random_prompt, write_model
from gpu_servers import READY_SECONDS, SERVED, STOCK
from serving import assert_idle, gap_at_first_difference

from sglang_lsa.patches import compatibility
from sglang_lsa.server_process import LSA, ServerProcess

pytestmark = [pytest.mark.server, pytest.mark.slow]
BACKENDS = ("flashinfer", "fa3")
AHEAD = 3
"""Families whose servers start or run at the same time, two for each."""
WITH_GRAPHS = "llama"
"""The family that decodes with CUDA graphs; to capture them takes time."""
FLAGS = [
    "--dtype",
    "bfloat16",
    "--skip-tokenizer-init",
    "--chunked-prefill-size",
    "1024",
    "--max-running-requests",
    "8",
]
WITH_LSA = ["--lsa-device-tokens", "8192", "--lsa-host-memory-gb", "0.5", "--lsa-min-context", "512", "--lsa-debug"]
WITH_LSA += ["--lsa-config", '{"groups": false, "floor_tokens": 512}', "--lsa-calibrate", "never"]
WHOLE, STREAMED, TOGETHER = (600, 3000, 5000), 20_000, (5000, 5500, 6000, 6500)
"""Tokens of prompts that fit the device pool, of one that does not, and of some that fit one at a time."""
TOLERANCE = 0.06
"""Of logarithmic probabilities, in the mean: twice what bfloat16 rounds; see ``families.SMALL``."""
TIE = 0.2
"""How much likelier a token may be to stock than the one that LSA has in its place: what bfloat16 may well move,
where two orders of summation choose other experts, say."""


def missing(backend: str) -> str | None:
    """Why servers cannot attend with this backend here; None if they can."""
    if backend not in compatibility.BACKENDS["cuda"]:
        return f"LSA has no {backend}"
    if backend == "fa3" and torch.cuda.get_device_capability()[0] != 9:
        return "FlashAttention-3 needs a GPU of compute capability 9 (Hopper)"
    if backend == "fa3":
        try:
            importlib.import_module("sgl_kernel.flash_attn")
        except ImportError as error:
            return f"sgl_kernel has no FlashAttention-3 here ({error})"
    return None


class Fleet:
    """Two servers for each case (backend, family), ``stock`` and ``lsa``, started in the order of the cases."""

    def __init__(self, cases: list[tuple[str, str]], folder: pathlib.Path, extra: list[str]):
        self.cases, self.folder, self.extra = cases, folder, extra
        self.started: dict[tuple[str, str], dict[str, ServerProcess]] = {}

    def get(self, case: tuple[str, str]) -> dict[str, ServerProcess]:
        """The servers of a case, ready; those of the next ones are started."""
        first = self.cases.index(case)
        for wanted in self.cases[first : first + AHEAD]:
            if wanted not in self.started:
                self.started[wanted] = self._start(*wanted)
        for server in self.started[case].values():
            server.wait_until_ready(READY_SECONDS)
        return self.started[case]

    def _start(self, backend: str, family: str) -> dict[str, ServerProcess]:
        folder = self.folder / family
        if not folder.exists():
            write_model(folder, family, SMALL, torch.bfloat16)
        graphs = ["--cuda-graph-max-bs-decode", "4"] if family == WITH_GRAPHS else ["--disable-cuda-graph"]
        shared = ["--model-path", str(folder), *SERVED, *FLAGS, "--attention-backend", backend]
        kinds = {
            "stock": (STOCK, ["--disable-cuda-graph", "--max-total-tokens", "32768"]),
            "lsa": (LSA, [*graphs, *WITH_LSA]),
        }
        return {
            name: ServerProcess(module, [*shared, *flags, *self.extra], self.folder / f"{family}-{backend}-{name}.log")
            for name, (module, flags) in kinds.items()
        }

    def stop(self, case: tuple[str, str]) -> None:
        for server in self.started.get(case, {}).values():
            server.stop()


@pytest.fixture(scope="module")
def fleet(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, extra: list[str]
) -> Iterator[Fleet]:
    """For the cases that were asked for and can run here."""
    asked = [item.callspec.params for item in request.session.items if item.path == request.path]
    cases = [(case["backend"], case["family"]) for case in asked if missing(case["backend"]) is None]
    fleet = Fleet(cases, tmp_path_factory.mktemp("families"), extra)
    yield fleet
    for case in cases:
        fleet.stop(case)


def compare(stock: Answered, lsa: Answered, name: str) -> None:
    """Print and check: the same log-probabilities of the prompt and of the answer, up to where the two part at a
    tie."""
    parted = [a != b for a, b in zip(stock.tokens, lsa.tokens, strict=True)]
    equal = parted.index(True) if any(parted) else len(parted)
    known = len(stock.prompt) + equal
    apart = np.abs(stock.chances[:known] - lsa.chances[:known])
    gap = gap_at_first_difference(stock.answer, lsa.answer)
    print(f"{name}: {equal} of {len(parted)} tokens equal, apart {apart.mean():.1e}, at most {apart.max():.1e}, {gap=}")
    assert apart.mean() < TOLERANCE
    assert gap is None or gap < TIE, "an answer parts where stock leaves no doubt"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_family_is_what_stock_says(backend: str, family: str, fleet: Fleet) -> None:
    if (reason := missing(backend)) is not None:
        pytest.skip(reason)
    servers = fleet.get((backend, family))
    stock, lsa = servers["stock"], servers["lsa"]
    print()
    for length in WHOLE:
        prompt = random_prompt(length, length)
        compare(ask(stock, prompt, 24), ask(lsa, prompt, 24, budget=1.0), f"{length} tokens, read whole")
    prompt = random_prompt(STREAMED, 1)
    expected, streamed = ask(stock, prompt, 1), ask(lsa, prompt, 100, "streamed", budget=0.135)
    compare(expected, Answered(streamed.prompt, streamed.answer[:1]), f"{STREAMED} tokens, streamed")

    prompts = [random_prompt(length, length) for length in TOGETHER]
    with ThreadPoolExecutor(len(prompts)) as pool:
        pruned = list(pool.map(lambda prompt: ask(lsa, prompt, 200, budget=0.135), prompts))
    assert [len(answered.tokens) for answered in (streamed, *pruned)] == [100, *[200] * len(prompts)]
    assert all(np.isfinite(answered.chances).all() for answered in (streamed, *pruned))
    status = lsa.get("/lsa/status")
    print(f"{status['recalls']['pages']} pages recalled, {status['prefill']['streamed_pages']} streamed")
    assert status["recalls"]["pages"] > 0
    assert status["prefill"]["streamed_pages"] > 0
    assert status["fallbacks"] == 0
    assert_idle(lsa)
    fleet.stop((backend, family))
