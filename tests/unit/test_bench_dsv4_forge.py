"""``bench dsv4`` without a GPU: what is forged into SGLang's own tree and allocators, and the plugin that does it."""

from __future__ import annotations

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
from bench_dsv4 import VOCABULARY
from sglang.srt.mem_cache.allocator.swa import SWATokenToKVPoolAllocator
from sglang.srt.mem_cache.base_prefix_cache import EvictParams, MatchPrefixParams
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.mem_cache.unified_cache.components import ComponentType
from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache
from simulated_swa import WindowPool, swa_allocator

from sglang_lsa.bench import dsv4_plugin
from sglang_lsa.bench.dsv4_arms import Dsv4Arm
from sglang_lsa.bench.dsv4_forge import Forge, drawn_entries, drawn_index_keys
from sglang_lsa.config import LSAConfig
from sglang_lsa.engine.native_index import NativeIndex
from sglang_lsa.engine.runtime import LSARuntime
from sglang_lsa.memory.layout.dsv4 import INDEX_ROW, KV_ROW, PAGE_TOKENS, Dsv4Layout
from sglang_lsa.memory.pager import Pager
from sglang_lsa.radix_ext.radix_cache import build_tree_cache

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
