"""``bench dsv4`` without a GPU: what fits, what is forged into SGLang's own tree and allocators, what a server is
asked, and what becomes of it."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import pathlib
import threading
from array import array
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from sglang.srt.mem_cache.allocator.swa import SWATokenToKVPoolAllocator
from sglang.srt.mem_cache.base_prefix_cache import EvictParams, MatchPrefixParams
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.mem_cache.unified_cache.components import ComponentType
from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache
from simulated_swa import WindowPool, swa_allocator

from sglang_lsa.bench import dsv4, dsv4_arms, dsv4_plugin
from sglang_lsa.bench.dsv4_arms import DSV4_ARMS, DSV4_SYSTEMS, Dsv4Arm, Plan, plan
from sglang_lsa.bench.dsv4_forge import Forge, drawn_entries, drawn_index_keys
from sglang_lsa.bench.dsv4_report import DSV4, comparisons, table
from sglang_lsa.bench.dsv4_shapes import DSV4_SHAPES
from sglang_lsa.bench.parser import add_parser
from sglang_lsa.config import LSAConfig
from sglang_lsa.engine.native_index import NativeIndex
from sglang_lsa.engine.runtime import LSARuntime
from sglang_lsa.memory.layout.dsv4 import INDEX_ROW, KV_ROW, PAGE_TOKENS, Dsv4Layout
from sglang_lsa.memory.pager import Pager
from sglang_lsa.radix_ext.radix_cache import build_tree_cache
from sglang_lsa.server_process import ServerFailed
from sglang_lsa.streaming import Stream

GB = 1 << 30
RANK, TINY = DSV4_SHAPES["rank"], DSV4_SHAPES["tiny"]
VOCABULARY = 1000

# --- shapes and what fits ---------------------------------------------------------------------------------------------


def test_a_rank_has_the_kv_of_the_whole_model() -> None:
    assert (len(RANK.ratios), RANK.c4_layers, RANK.c128_layers) == (43, 21, 20)
    assert RANK.page_bytes == 963_648
    assert RANK.token_bytes + 0.1 * RANK.window_token_bytes == pytest.approx(7705.45), "as SGLang counts it"
    assert RANK.share(1.0) > 1, "what LSA keeps of absent pages costs, too"
    assert RANK.share(0.135) == pytest.approx(0.192, abs=1e-3)
    assert RANK.nominal_share(0.135) == pytest.approx(0.178, abs=1e-3)
    assert RANK.nominal_share(0.1) == pytest.approx(0.144, abs=1e-3)


@pytest.mark.parametrize("weights", ["bfloat16", "fp8"])
def test_a_shape_is_a_configuration(weights: str, tmp_path: pathlib.Path) -> None:
    folder = RANK.write(tmp_path / "new", weights)
    config = json.loads((folder / "config.json").read_text())
    assert config["num_hidden_layers"] == len(config["compress_ratios"]) == 43
    assert (config["n_routed_experts"], config["moe_intermediate_size"]) == (256, 256)
    assert ("quantization_config" in config) == (weights == "fp8")
    assert config["max_position_embeddings"] > DSV4_ARMS["1m"].context + 10_000


@pytest.fixture
def roomy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dsv4_arms, "available_host_memory", lambda: 128 * GB)


def planned(arm: str, system: str, kv_gb: float = 45, share: int = 1, tokens: int = 768) -> Plan:
    asked: dict[str, Any] = {"kv_bytes": int(kv_gb * 1e9), "tokens": tokens, "share": share, "budget": 0.1}
    return plan(DSV4_ARMS[arm], DSV4_SYSTEMS[system], RANK, **asked)


@pytest.mark.usefixtures("roomy")
@pytest.mark.parametrize("arm", ["256k", "512k", "1m"])
def test_more_requests_fit_with_smaller_windows_and_still_more_with_lsa(arm: str) -> None:
    stock, tuned, lsa = (planned(arm, system) for system in DSV4_SYSTEMS)
    assert stock.requests < tuned.requests < lsa.requests
    assert stock.window_ratio is None and 0 < tuned.window_ratio < 0.01  # type: ignore[operator]
    assert (stock.host_gb, tuned.host_gb) == (0, 0)
    assert lsa.host_gb <= 108, "host memory is left for the server"
    least = lsa.distinct * DSV4_ARMS[arm].context / PAGE_TOKENS * RANK.page_bytes / GB
    assert lsa.host_gb > least, "the mirror holds every prefix"


@pytest.mark.usefixtures("roomy")
def test_prefixes_that_are_shared_make_more_requests_of_the_same_memory() -> None:
    one, three = (planned("1m", "lsa", share=share) for share in (1, 3))
    assert three.requests == 3 * three.distinct > one.requests == one.distinct
    assert three.host_gb < one.host_gb
    assert planned("1m", "stock-tuned", share=3).requests == 30
    assert planned("1x1m", "lsa", share=3).requests == 1


def test_what_does_not_fit_is_an_error(roomy: None, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"stock: not one prefix of 1,048,576 tokens fits 5 GB of KV: give more"):
        planned("1m", "stock", kv_gb=5)
    monkeypatch.setattr(dsv4_arms, "available_host_memory", lambda: 23 * GB)
    with pytest.raises(ValueError, match=r"lsa: .* fits 45 GB of KV and 3 GB of host memory"):
        planned("1m", "lsa")


def test_requests_take_turns_with_the_prefixes() -> None:
    arm = Dsv4Arm("asked", 512)
    prompts = [arm.prompt(number, 2, VOCABULARY).ids() for number in range(4)]
    assert prompts == [list(arm.prompt(number, 2, VOCABULARY)) for number in range(4)]
    assert [len(prompt) for prompt in prompts] == [512 + dsv4_arms.QUESTION] * 4
    assert prompts[0][:512] == prompts[2][:512] == arm.prefix(0, VOCABULARY).tolist() != prompts[1][:512]
    assert len({tuple(prompt[512:]) for prompt in prompts}) == 4
    assert all(type(token) is int for token in prompts[0])


# --- forging ----------------------------------------------------------------------------------------------------------


def part(layers: int, pages: int, row: int) -> Any:
    buffers = [torch.zeros((pages + 1, row), dtype=torch.uint8) for _ in range(layers)]
    return SimpleNamespace(kv_buffer=buffers, index_k_with_scale_buffer=buffers)


class Serving:
    """What of a scheduler is forged into: of SGLang alone, or of LSA with fewer device pages."""

    def __init__(self, lsa: bool, virtual: int = 40, physical: int = 6, windows: int = 20):
        self.virtual, pages = virtual, physical if lsa else virtual
        kv, index = part(2, pages, KV_ROW), part(2, pages, INDEX_ROW)
        self.pool = SimpleNamespace(
            swa_kv_pool=part(3, windows, 149_760),
            c128_kv_pool=part(1, virtual, 1_728),
            c4_kv_pool=kv,
            c4_indexer_kv_pool=index,
            compress_state_pools=[None, SimpleNamespace(kv_score_buffer=SimpleNamespace(kv_score=torch.zeros(5, 2)))],
            indexer_compress_state_pools=[None],
        )
        self.runtime: LSARuntime | None = None
        table = torch.zeros((4, virtual * PAGE_TOKENS), dtype=torch.int32)
        self.allocator: Any
        if lsa:
            layers = dict(zip((1, 3), kv.kv_buffer, strict=True))
            layout = Dsv4Layout(layers, dict(zip((1, 3), index.kv_buffer, strict=True)))
            pager = Pager(layout, virtual)
            own = NativeIndex((1, 3), 64, 128, 32, torch.float32)
            config = LSAConfig(policy="native", debug=True)
            self.runtime = LSARuntime(config, pager, table, 1, 1.0, index=own)
            self.allocator = swa_allocator(pager, windows)
        else:
            sizes = (virtual * PAGE_TOKENS, windows * PAGE_TOKENS, PAGE_TOKENS)
            self.allocator = SWATokenToKVPoolAllocator(*sizes, torch.float32, "cpu", WindowPool(), need_sort=False)
        self.pool.full_to_swa_index_mapping = self.allocator.full_to_swa_index_mapping
        params = CacheInitParams(
            disable=False,
            req_to_token_pool=SimpleNamespace(req_to_token=table, write=table.__setitem__),  # type: ignore[arg-type]
            token_to_kv_pool_allocator=self.allocator,
            page_size=PAGE_TOKENS,
            sliding_window_size=128,
        )
        self.tree: Any
        if self.runtime is not None:
            self.tree = build_tree_cache(params, self.runtime)
        else:
            params.tree_components = (ComponentType.FULL, ComponentType.SWA)
            self.tree = UnifiedRadixCache(params)
        self.forge = Forge(self.allocator, self.tree, self.pool, self.runtime)

    def match(self, prompt: list[int]) -> np.ndarray:
        """Pages that the tree has of it."""
        found = self.tree.match_prefix(MatchPrefixParams(key=RadixKey(array("q", prompt), None)))
        return found.device_indices[::PAGE_TOKENS].numpy() // PAGE_TOKENS

    def assert_in_order(self) -> None:
        self.tree.sanity_check()
        assert self.allocator.full_available_size() + self.tree.full_evictable_size() == self.allocator.size_full
        assert self.allocator.swa_available_size() + self.tree.swa_evictable_size() == self.allocator.size_swa
        if self.runtime is not None:
            self.runtime.check()
            assert self.runtime.pager.ledger.held_pages == 0
            assert not len(self.allocator.take_new_pages()), "the next batch would take them for its own"


ARM = Dsv4Arm("asked", 4 * PAGE_TOKENS)


@pytest.fixture(params=["stock", "lsa"])
def serving(request: pytest.FixtureRequest) -> Serving:
    return Serving(request.param == "lsa")


def test_forged_prefixes_are_found_by_sglangs_own_search(serving: Serving) -> None:
    assert serving.forge.prefixes(ARM, 3, VOCABULARY, 1) == 3
    serving.assert_in_order()
    places = serving.allocator.full_to_swa_index_mapping
    seen: list[int] = []
    for number in range(5):
        pages = serving.match(ARM.prompt(number, 3, VOCABULARY).ids())
        assert len(pages) == ARM.pages
        live = [bool(places[page * PAGE_TOKENS : (page + 1) * PAGE_TOKENS].all()) for page in pages.tolist()]
        assert live == [False, False, False, True], "the last window, and no other"
        seen += pages.tolist()
    assert len(set(seen)) == 3 * ARM.pages, "those of the same prefix share it"
    assert not len(serving.match(ARM.prompt(3, 4, VOCABULARY).ids())), "a prefix that is not there"


def test_forging_stops_where_requests_would_have_no_room(serving: Serving) -> None:
    assert serving.forge.prefixes(ARM, 100, VOCABULARY, 1) == 7, "of 40 pages 5 for each, and one more"
    serving.assert_in_order()
    small = Serving(serving.runtime is not None, windows=4)
    assert small.forge.prefixes(ARM, 100, VOCABULARY, 0) == 2, "a window for each, and one for its request"


def test_what_is_forged_can_be_evicted(serving: Serving) -> None:
    serving.forge.prefixes(ARM, 3, VOCABULARY, 1)
    serving.tree.evict(EvictParams(num_tokens=3 * ARM.context, swa_num_tokens=0))
    assert serving.allocator.full_available_size() == serving.allocator.size_full
    serving.assert_in_order()


def test_a_prefix_that_is_there_already_is_an_error(serving: Serving) -> None:
    serving.forge.prefixes(ARM, 1, VOCABULARY, 1)
    with pytest.raises(RuntimeError, match="had 1024 tokens of prefix 0 already: flush it first"):
        serving.forge.prefixes(ARM, 1, VOCABULARY, 1)


def test_pages_of_lsa_lie_in_its_mirror_and_their_index_keys_beside() -> None:
    lsa, stock = Serving(lsa=True), Serving(lsa=False)
    for each in (lsa, stock):
        assert each.forge.prefixes(ARM, 4, VOCABULARY, 1) == 4
    runtime = lsa.runtime
    assert runtime is not None
    assert runtime.pager.ledger.is_mirrored(range(1, 17)).all()
    for number in range(4):
        prompt = ARM.prompt(number, 4, VOCABULARY).ids()
        for mine, theirs in zip(lsa.match(prompt), stock.match(prompt), strict=True):
            assert mine % 8 == theirs % 8, "the same draw"
        pages = lsa.match(prompt)
        for slot, buffer in enumerate(stock.pool.c4_indexer_kv_pool.kv_buffer):
            assert torch.equal(runtime.page_keys.tables[slot][pages][:, 8192:], buffer[pages][:, 8192:])
        assert runtime.pager.mirror.pages[pages].any(dim=1).all()
        assert lsa.pool.c128_kv_pool.kv_buffer[0][pages].any(dim=1).all()
    assert runtime.pager.hold("a request", lsa.match(ARM.prompt(0, 4, VOCABULARY).ids())), "and come back"
    assert runtime.pager.ledger.recalls


def test_drawn_numbers_are_small_and_finite() -> None:
    entries, keys = drawn_entries(64, KV_ROW, 0), drawn_index_keys(64, INDEX_ROW, 1)
    values = entries[:, : 64 * 576].reshape(-1, 576)
    for part in (values[:, :448].contiguous().view(torch.float8_e4m3fn).float(), values[:, 448:].contiguous()):
        numbers = part if part.dtype == torch.float32 else part.view(torch.bfloat16).float()
        assert numbers.isfinite().all() and numbers.abs().max() < 4 and numbers.std() > 0
    assert (entries[:, 64 * 576 :] == 127).all(), "scales of 1"
    assert (keys[:, 8192:].contiguous().view(torch.float32) == 1).all()
    assert not torch.equal(entries[0], entries[1])


# --- the plugin -------------------------------------------------------------------------------------------------------


def test_the_plugin_is_found_where_it_is_installed(tmp_path: pathlib.Path) -> None:
    environment = dsv4_plugin.install(tmp_path / "plugin", 10**9)
    assert environment["PYTHONPATH"].startswith(str(tmp_path / "plugin"))
    (found,) = importlib.metadata.distributions(path=[str(tmp_path / "plugin")])
    (entry,) = found.entry_points
    assert entry.group == "sglang.srt.plugins" and entry.load() is dsv4_plugin.register
    assert environment[dsv4_plugin.FOLDER] == str(tmp_path / "plugin")


def scheduler(serving: Serving, idle: bool = True) -> Any:
    runner = SimpleNamespace(lsa=serving.runtime) if serving.runtime else SimpleNamespace()
    serving.allocator.get_kvcache = lambda: serving.pool
    return SimpleNamespace(
        is_fully_idle=lambda: idle,
        token_to_kv_pool_allocator=serving.allocator,
        tree_cache=serving.tree,
        tp_worker=SimpleNamespace(model_runner=runner),
    )


@pytest.fixture
def no_churn() -> Iterator[None]:
    yield
    dsv4_plugin.CHURN.share = None


@pytest.mark.usefixtures("no_churn")
def test_an_idle_server_does_what_it_is_asked(serving: Serving, tmp_path: pathlib.Path) -> None:
    desk, server = dsv4_plugin.Desk(tmp_path), scheduler(serving)
    assert desk.look(server) is None, "nothing is asked, and SGLang takes what a hook returns for arguments"

    def asked(what: dict[str, Any]) -> Any:
        answers: list[Any] = []
        client = threading.Thread(target=lambda: answers.append(dsv4_plugin.ask(tmp_path, what, lambda: True, 60)))
        client.start()
        while client.is_alive():
            desk.look(server)
            client.join(0.01)
        return answers[0]

    what = {"context": ARM.context, "most": 2, "vocabulary": VOCABULARY, "spare": 1}
    found = asked(what)
    assert found["forged"] == 2
    pages = 7 if serving.runtime else 41
    assert found["pools"]["c4_kv"] == 2 * pages * KV_ROW and found["pools"]["c4_index"] == 2 * pages * INDEX_ROW
    assert found["pools"]["c128_kv"] == 41 * 1_728 and found["pools"]["states"] == 40
    assert asked({"churn": 0.25}) == {"churn": 0.25}
    assert dsv4_plugin.CHURN.share == 0.25


def test_what_a_server_cannot_do_it_says(serving: Serving, tmp_path: pathlib.Path) -> None:
    desk = dsv4_plugin.Desk(tmp_path)
    (tmp_path / dsv4_plugin.ASKED).write_text(json.dumps({"context": 512}))
    desk.look(scheduler(serving, idle=False))
    assert desk.asked.exists() and not desk.answer.exists(), "it is busy"
    desk.look(scheduler(serving))
    assert json.loads((tmp_path / dsv4_plugin.ANSWER).read_text()) == {"error": "KeyError: 'most'"}
    with pytest.raises(RuntimeError, match="could not do"):
        dsv4_plugin.ask(tmp_path, {"churn": 1}, lambda: True)
    (tmp_path / dsv4_plugin.ASKED).unlink()
    with pytest.raises(RuntimeError, match="did not answer"):
        dsv4_plugin.ask(tmp_path, {"churn": 1}, lambda: False)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.3, 1.0])
@pytest.mark.usefixtures("no_churn")
def test_every_window_replaces_that_share_of_a_set(share: float) -> None:
    pages, budget = 4096, 0.1
    keep = int(pages * budget)
    real: list[int] = []

    def score(self: Any, request: Any, of: Any) -> torch.Tensor:
        real.append(len(of))
        return torch.arange(len(of), dtype=torch.float32)

    scored, request = (
        dsv4_plugin.churned(score),
        SimpleNamespace(window=-1, asked=SimpleNamespace(seed=5, budget=budget)),
    )
    assert scored(None, request, np.arange(pages)).tolist() == list(range(pages)), "the policy's own"
    dsv4_plugin.CHURN.share = share
    before: set[int] | None = None
    for window in range(5):
        request.window = window
        scores = scored(None, request, np.arange(pages))
        kept = set(scores.topk(keep).indices.tolist())
        if before is not None:
            assert len(kept - before) == pytest.approx(share * keep, abs=3)
        before = kept
    assert real == [pages] * 6, "scoring costs what it costs"


def test_all_systems_have_the_same_budget() -> None:
    hook, seen = dsv4_plugin.budget_of(10), []

    def original(self: Any, budget: int, **options: Any) -> str:
        seen.append((budget, options))
        return "configuration"

    assert hook(original, None, 12, cap_tokens=3) == "configuration"
    assert seen == [(10, {"cap_tokens": 3})]
    with pytest.raises(ValueError, match="give less with --kv-gb"):
        hook(original, None, 9)


# --- rows -------------------------------------------------------------------------------------------------------------


def asked_of(**other: Any) -> dsv4.Asked:
    values: dict[str, Any] = {"shape": RANK, "weights": "bfloat16", "kv_gb": 45, "tokens": 64, "share": 1}
    return dsv4.Asked(**(values | {"budget": 0.1, "churns": (0.0, 0.1)} | other))


@pytest.mark.usefixtures("roomy")
@pytest.mark.parametrize("name", DSV4_SYSTEMS)
def test_a_server_gets_the_window_and_the_mirror_of_its_plan(name: str) -> None:
    system, arm = DSV4_SYSTEMS[name], DSV4_ARMS["512k"]
    found = planned("512k", name)
    flags = dsv4.arguments(asked_of(), arm, system, found, pathlib.Path("model"))
    assert ("--swa-full-tokens-ratio" in flags) == (name != "stock")
    assert ("--lsa-host-memory-gb" in flags) == system.lsa == any(flag.startswith("--lsa") for flag in flags)
    assert flags[flags.index("--max-running-requests") + 1] == str(found.requests)
    assert int(flags[flags.index("--context-length") + 1]) > arm.context + 64


class FakeServer:
    """Answers what a benchmark asks of a server with LSA."""

    url = "http://nowhere"

    def __init__(self) -> None:
        self.process = SimpleNamespace(poll=lambda: None)
        self.statuses = iter((status(0, 0, 0), status(300, 4, 400)))
        self.posted: list[str] = []

    def get(self, path: str) -> Any:
        assert path == "/lsa/status"
        return next(self.statuses)

    def post(self, path: str, body: Any, **options: Any) -> None:
        self.posted.append(path)


def status(prefetched: int, samples: int, held: int) -> dict[str, Any]:
    return {
        "page_bytes": 1000,
        "physical": {"overhead_bytes": {"page_keys": 50, "tables": 7, "c128_kv": 4000}},
        "recalls": {"prefetched_pages": prefetched, "late_pages": prefetched // 100},
        "host": {"mirror_bytes": 9000},
        "pressure": {"retractions": 0},
        "decoding": {"2": {"samples": samples, "held_pages": samples * held}},
        "stalls": 0,
        "graphless_steps": 0,
    }


def streams(cached: int, requests: int) -> list[Stream]:
    times = [float(time) for time in range(1, 66)]
    found = [Stream(0.5, list(times), list(range(1, 66)), done=True) for _ in range(requests)]
    for stream in found:
        stream.usage = {"cached_tokens": cached}
    return found


@pytest.fixture
def measurement(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> dsv4.Measurement:
    answers = {"forged": 2, "pools": {"c4_kv": 100, "c128_kv": 30}}
    monkeypatch.setattr(dsv4_plugin, "ask", lambda folder, what, alive: answers if "most" in what else what)
    made = Plan(3, 3, 0.01, 20.0)
    server: Any = FakeServer()
    return dsv4.Measurement(server, tmp_path, asked_of(), DSV4_ARMS["256k"], DSV4_SYSTEMS["lsa"], made)


def sending(monkeypatch: pytest.MonkeyPatch, cached: int) -> list[int]:
    sent: list[int] = []

    async def together(url: str, prompts: Any, tokens: int) -> list[Stream]:
        sent.append(len(prompts))
        return streams(cached, len(prompts))

    monkeypatch.setattr(dsv4, "run_together", together)
    return sent


def test_a_row_says_what_ran_what_it_weighed_and_what_was_recalled(
    measurement: dsv4.Measurement, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent = sending(monkeypatch, DSV4_ARMS["256k"].context)
    measurement.warm_up()
    assert measurement.forge()["forged"] == 2
    row = measurement.row(DSV4_ARMS["256k"], 0.1)
    assert sent == [1, 2], "what was forged, not what was planned"
    assert (row["running_requests"], row["distinct_prefixes"], row["requests"]) == (2, 2, 2)
    assert row["decode_tokens_per_s"] == pytest.approx(2)
    assert row["tpot_ms_p50"] == row["tpot_ms_p99"] == 1000
    assert row["recall_bytes_per_s"] == pytest.approx(300 * 1000 / 64)
    assert row["host_bytes"] == 9000
    assert row["kv_bytes"] == 100 + 30 + 57, "pools, and what LSA has beside; c128 is a pool"
    assert row["gpu_share"] == pytest.approx(RANK.share(400 / 2048))
    assert row["gpu_share_nominal"] == pytest.approx(RANK.nominal_share(400 / 2048))
    assert set(DSV4.key) - {"gpu"} <= set(row)


def test_requests_that_missed_their_prefix_are_no_measurement(
    measurement: dsv4.Measurement, monkeypatch: pytest.MonkeyPatch
) -> None:
    sending(monkeypatch, 0)
    measurement.forge()
    with pytest.raises(RuntimeError, match="2 of 2 requests found 0 tokens of their prefix, not 262144"):
        measurement.row(DSV4_ARMS["256k"], 0.0)


# --- runs and results -------------------------------------------------------------------------------------------------


class Bench:
    """``run`` with servers that take no time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, output: pathlib.Path):
        self.output, self.seen, self.broken = output, [], ""
        self.seen: list[tuple[str, str, list[float | None]]]
        self.servers: list[str] = []
        monkeypatch.setattr(dsv4, "gpu_name", lambda: "GPU of a test")
        monkeypatch.setattr(dsv4, "measure", self.measure)
        monkeypatch.setattr(dsv4, "DSV4", dataclasses.replace(DSV4, draw=lambda *_: None))

    def measure(self, asked: dsv4.Asked, system: Any, arm: Any, rows: Any, *_: Any) -> Iterator[dict[str, Any]]:
        self.servers.append(arm.name)
        names = "+".join(dict.fromkeys(arm.name for arm, _ in rows))
        self.seen.append((names, system.name, [churn for _, churn in rows]))
        if self.broken == system.name:
            raise ServerFailed("no V4 here")
        for arm, churn in rows:
            yield dsv4.labels(asked, arm, system, churn) | figures(30.0 if system.lsa else 10.0)

    def run(self, **other: Any) -> list[tuple[str, str, list[float | None]]]:
        chosen: dict[str, Any] = {"models": ["rank"], "weights": "bfloat16", "arms": ["1m"], "kv_gb": 45.0, "share": 1}
        chosen |= {"systems": list(DSV4_SYSTEMS), "tokens": 64, "budget": 0.1, "churns": [0, 10], "resume": False}
        self.seen = []
        dsv4.run(self.output, Console(quiet=True), command="", **({"server_args": ""} | chosen | other))
        return self.seen


def figures(tokens_per_s: float) -> dict[str, Any]:
    found: dict[str, Any] = {"decode_tokens_per_s": tokens_per_s, "running_requests": 3, "distinct_prefixes": 3}
    found |= dict.fromkeys(("tpot_ms_p50", "tpot_ms_p99", "recall_bytes_per_s"), 1.0)
    return found | {"kv_bytes": 10**9, "host_bytes": 0, "gpu_share": 0.19, "gpu_share_nominal": None}


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> Bench:
    return Bench(monkeypatch, tmp_path)


def test_every_system_of_an_arm_is_measured_and_lsa_with_every_churn(bench: Bench) -> None:
    everything = [("1m", "stock", [None]), ("1m", "stock-tuned", [None]), ("1m", "lsa", [0.0, 0.1])]
    assert bench.run() == everything
    assert bench.run(resume=True) == []
    assert bench.run(resume=True, churns=[0, 30]) == [("1m", "lsa", [0.3])]
    assert bench.run(resume=True, kv_gb=30.0, systems=["stock"]) == [("1m", "stock", [None])]
    assert [row["gain"] for row in DSV4.read(bench.output) if row["system"] == "lsa"] == [3, 3, 3]


def test_rows_of_servers_with_other_arguments_are_other_rows(bench: Bench) -> None:
    asked = {"resume": True, "systems": ["stock-tuned", "lsa"], "churns": [10]}
    seen = bench.run(**asked)
    assert bench.run(**asked, server_args="--log-level info") == seen
    assert bench.run(**asked, server_args="--log-level  info") == bench.run(**asked) == []
    bench.run(**asked | {"systems": ["stock"]}, server_args="--log-level info")
    compared = {row["server_args"]: row for row in DSV4.read(bench.output) if row["system"] == "lsa"}
    assert "gain_to_stock" not in compared[""] and "gain_to_stock" in compared["--log-level info"]
    with pytest.raises(ValueError, match="--server-args --x 'y: cannot be split"):
        bench.run(server_args="--x 'y")


def test_logs_of_other_runs_are_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    """By names that tell arms, churns and arguments apart."""
    logs: list[pathlib.Path] = []

    def begin(module: str, flags: Any, log: pathlib.Path, environment: Any) -> Any:
        logs.append(log)
        raise ServerFailed("no server here")

    monkeypatch.setattr(dsv4, "ServerProcess", begin)
    monkeypatch.setattr(dsv4_arms, "available_host_memory", lambda: 1 << 50)
    arm, lsa = DSV4_ARMS["256k"], DSV4_SYSTEMS["lsa"]
    asked = asked_of()
    others = [
        asked,
        *(dataclasses.replace(asked, **one) for one in ({"tokens": 32}, {"server_args": "--log-level info"})),
    ]
    for one, churns in [*((one, (0.0,)) for one in others), (asked, (0.0, 0.1)), (asked, (0.0,))]:
        with pytest.raises(ServerFailed):
            list(dsv4.measure(one, lsa, arm, [(arm, churn) for churn in churns], tmp_path, Console(quiet=True)))
    assert len(set(logs)) == 4 and logs[0] == logs[-1]


def test_arms_of_one_context_share_a_server_that_is_made_for_the_most_requests(bench: Bench) -> None:
    seen = bench.run(arms=["1x1m", "256k", "1m"], systems=["stock-tuned", "lsa"], churns=[10])
    assert seen == [
        ("1m+1x1m", "stock-tuned", [None, None]),
        ("1m+1x1m", "lsa", [0.1, 0.1]),
        ("256k", "stock-tuned", [None]),
        ("256k", "lsa", [0.1]),
    ]
    assert bench.run(arms=["1x1m"], systems=["lsa"], churns=[30], resume=True) == [("1x1m", "lsa", [0.3])]
    assert bench.run(arms=["1m", "1x1m"], systems=["lsa"], churns=[30], resume=True) == [("1m", "lsa", [0.3])]
    assert bench.servers == ["1m", "1m", "256k", "256k", "1x1m", "1m"]


def test_one_request_is_measured_over_prefixes_that_fill_the_kv(
    measurement: dsv4.Measurement, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = dataclasses.replace(DSV4_ARMS["256k"], name="1x256k", requests=1)
    sent = sending(monkeypatch, alone.context)
    measurement.forge()
    row = measurement.row(alone, 0.1)
    assert sent == [1, 1]
    assert (row["arm"], row["requests"], row["distinct_prefixes"], row["running_requests"]) == ("1x256k", 1, 1, 1)


def test_a_system_that_fails_leaves_the_others(bench: Bench) -> None:
    bench.broken = "stock"
    with pytest.raises(RuntimeError, match="stock rank 1m: no V4 here"):
        bench.run()
    assert len(DSV4.read(bench.output)) == 3
    bench.broken = ""
    assert bench.run(resume=True) == [("1m", "stock", [None])]


def rows(*systems: str, **other: Any) -> list[dict[str, Any]]:
    found = []
    for number, name in enumerate(systems):
        system = DSV4_SYSTEMS[name]
        label = dsv4.labels(asked_of(**other), DSV4_ARMS["1m"], system, 0.1 if system.lsa else None)
        found.append(label | figures(10.0 * (number + 1)) | {"gpu": "a card"})
    return found


def test_lsa_is_compared_with_the_fastest_stock_that_has_the_same_bytes() -> None:
    (found,) = comparisons([*rows("stock", "stock-tuned", "lsa"), *rows("stock", kv_gb=30)])
    assert found.fastest == "stock-tuned"
    assert found.ratios == {"stock-tuned": 1.5, "stock": 3.0}


def test_results_are_written_as_csv_table_and_picture(tmp_path: pathlib.Path) -> None:
    DSV4.write(tmp_path, rows("stock", "stock-tuned", "lsa"))
    assert {file.suffix for file in tmp_path.iterdir()} == {".json", ".csv", ".png"}
    console = Console(width=250, record=True, quiet=False, file=(tmp_path / "out").open("w"))
    console.print(table(DSV4.read(tmp_path)))
    text = console.export_text()
    assert "1.50x stock-tuned" in text and "19.0%" in text and "10%" in text


def test_what_it_is_asked(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    seen: dict[str, Any] = {}
    monkeypatch.setattr(dsv4, "run", lambda output, console, **asked: seen.update(asked))
    parser = argparse.ArgumentParser()
    add_parser(parser.add_subparsers())
    args = parser.parse_args(["bench", "dsv4", "--arms", "1m,256k", "--output", str(tmp_path), "--share", "3"])
    assert args.run(args) == 0
    assert (seen["arms"], seen["share"], seen["kv_gb"]) == (["1m", "256k"], 3, 45.0)
    assert (seen["systems"], seen["churns"]) == (["stock", "stock-tuned", "lsa"], [0, 10, 30])
    assert parser.parse_args(["bench", "dsv4", "--budget", "2"]).run(args) == 0
    assert args.run(parser.parse_args(["bench", "dsv4", "--budget", "2"])) == 1
