"""Policies: what each says of itself, what a server makes of it, and those of the repository that need no model."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from sglang_lsa.config import FULL, PAGE_SIZE, POLICIES, LSAConfig, RequestOptions, looks_at_index, offered
from sglang_lsa.engine import policies
from sglang_lsa.engine.policies import (
    REGISTRY,
    Indexer,
    Parts,
    Policy,
    Quest,
    Random,
    Recency,
    Retriever,
    needed,
    register,
)
from sglang_lsa.engine.request import Asked, Request
from sglang_lsa.engine.runtime import LSARuntime
from sglang_lsa.engine.sizing import selector_needs
from sglang_lsa.memory.layout.mha import MhaLayout
from sglang_lsa.memory.pager import Pager
from sglang_lsa.serve.control import changed
from sglang_lsa.serve.status import overhead_bytes


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    """What a test registers is forgotten."""
    policies_before, names_before = dict(REGISTRY), dict(POLICIES)
    yield
    REGISTRY.clear()
    REGISTRY.update(policies_before)
    POLICIES.clear()
    POLICIES.update(names_before)


def make_runtime(**options: object) -> LSARuntime:
    keys, values = ([torch.zeros(41 * PAGE_SIZE, 1, 2)] for _ in range(2))
    pager = Pager(MhaLayout(keys, values, PAGE_SIZE), 64)
    return LSARuntime(LSAConfig(**options), pager, torch.zeros((9, 20 * PAGE_SIZE), dtype=torch.int32), 2, 1.0)


# --- the registry ----------------------------------------------------------------------------------------------------


def test_every_name_that_can_be_asked_for_is_a_policy_or_full() -> None:
    assert {*REGISTRY, FULL} == set(POLICIES)
    assert all(policy.name == name for name, policy in REGISTRY.items())


def test_what_the_policies_say_of_themselves() -> None:
    said = {
        name: (policy.queries, policy.page_keys, policy.index, policy.calibrated) for name, policy in REGISTRY.items()
    }
    nothing = (False, False, False, False)
    assert said == {
        "indexer": (True, False, False, True),
        "retriever": (True, False, True, False),
        "quest": (True, True, False, False),
        "native": (True, False, True, False),
        "recency": nothing,
        "random": nothing,
    }


@pytest.mark.parametrize(
    ("indexer", "names"),
    [(None, ("quest", "recency", "random", FULL)), ("folder", ("indexer", "quest", "recency", "random", FULL))],
)
def test_what_a_server_offers_and_its_default(indexer: str | None, names: tuple[str, ...]) -> None:
    assert offered(indexer) == names
    assert LSAConfig(indexer=indexer).policy == names[0]


@pytest.mark.parametrize(
    ("indexer", "names"),
    [(None, ("native", "recency", "random", FULL)), ("file", ("retriever", "native", "recency", "random", FULL))],
)
def test_what_is_offered_where_the_model_has_an_index(indexer: str | None, names: tuple[str, ...]) -> None:
    assert offered(indexer, index=True) == names
    assert [policy.name for policy in needed(LSAConfig(indexer=indexer), index=True)] == list(names[:-1])
    assert set(offered(indexer, None)) == {*names, *offered(indexer)}, "either, as long as the model is not known"


def test_policies_say_which_models_they_fit() -> None:
    assert {name: looks_at_index(name) for name in POLICIES} == {
        "indexer": False,
        "retriever": True,
        "quest": False,
        "native": True,
        "recency": None,
        "random": None,
        FULL: None,
    }


def test_a_policy_for_another_kind_of_model_is_refused() -> None:
    with pytest.raises(ValueError, match="--lsa-policy native does not fit this model: use one of quest, recency"):
        make_runtime(policy="native")


def test_a_prompt_over_a_resident_prefix_is_not_offered_where_prompts_are_whole() -> None:
    asked, config = {"lsa": {"prefill": "resident"}}, LSAConfig(policy="native")
    assert RequestOptions.parse(asked, LSAConfig(), index=False).prefill == "resident"
    with pytest.raises(ValueError, match="prefill is 'resident': use one of exact"):
        RequestOptions.parse(asked, config, 256, index=True)
    with pytest.raises(ValueError, match="prefill is 'resident': prompts of this model are whole: use exact"):
        changed(config, {"prefill": "resident"}, index=True)
    assert changed(config, {"prefill": "exact", "budget": 0.5}, index=True).budget == 0.5
    assert changed(LSAConfig(), {"prefill": "resident"}, index=False).prefill == "resident"


def test_whether_somebody_asked_for_the_policy() -> None:
    assert LSAConfig().policy_is_default and LSAConfig(indexer="folder").policy_is_default
    assert not LSAConfig(policy="quest").policy_is_default


class KeySums(Policy):
    """Pages by the sum of the first numbers of their keys, which it remembers itself."""

    name = "key-sums"
    queries = True
    calibrated = True
    threshold = 0.125

    def __init__(self, parts: Parts) -> None:
        self.sums = torch.zeros(parts.virtual_pages + 1)
        self.layout = parts.layout

    @classmethod
    def build(cls, parts: Parts) -> KeySums:
        return cls(parts)

    @classmethod
    def positions(cls, config: LSAConfig) -> int:
        return 77

    @classmethod
    def page_bytes(cls, config: LSAConfig) -> int:
        return 4

    @property
    def nbytes(self) -> int:
        return self.sums.numel() * 4

    def complete(self, virtual: np.ndarray, physical: np.ndarray) -> None:
        keys = self.layout.keys(0, torch.from_numpy(physical))
        assert keys is not None
        self.sums[torch.from_numpy(virtual)] = keys.sum(dim=(1, 2, 3))

    def score(self, request: Request, pages: np.ndarray) -> torch.Tensor:
        return self.sums[torch.from_numpy(pages)]


def test_a_registered_policy_is_built_sized_fed_and_asked() -> None:
    register(KeySums)
    runtime = make_runtime(policy="key-sums")
    assert RequestOptions.parse({"lsa": {"policy": "key-sums"}}, runtime.config).policy == "key-sums"
    assert (runtime.observer.positions, runtime.lookahead.rules.thresholds) == (77, {"key-sums": 0.125})
    needs = selector_needs(
        runtime.config,
        runtime.pager.layout.shape,
        rows=9,
        chunk_tokens=0,
        graph_batches=(),
        context_tokens=20 * PAGE_SIZE,
        layers=1,
        q_heads=2,
        kv_heads=1,
        head_dim=2,
        itemsize=4,
    )
    planned = needs.overhead(runtime.config, 40 * PAGE_SIZE, 64 * PAGE_SIZE)
    assert planned["key-sums"] == overhead_bytes(runtime)["key-sums"] == 65 * 4
    pages = np.array([3, 5, 4])
    runtime.pager.ledger.allocate(pages)
    assert runtime.pager.hold("a", pages)
    for page, value in zip(pages.tolist(), (0.5, 2.0, 1.0), strict=True):
        physical = int(runtime.pager.ledger.v2p[page])
        runtime.pager.layout.key_buffers[0][physical * PAGE_SIZE, 0, 0] = value
    runtime._remember(pages)
    request = Request("a", 1, Asked("key-sums", 0.5), tokens=3 * PAGE_SIZE)
    request.pages = pages
    fetch = runtime.lookahead.scorer.score(request, 3)
    assert fetch.values().tolist() == [0.5, 2.0, 1.0]
    assert not fetch.failed


@pytest.mark.parametrize("name", ["quest", "full", "key-sums"])
def test_a_name_is_given_once(name: str) -> None:
    register(KeySums)
    other = type("Other", (Recency,), {"name": name})
    with pytest.raises(ValueError, match=f"there is a policy '{name}' already: give Other another name"):
        register(other)


def test_where_nothing_looks_at_keys_none_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    assert make_runtime().page_keys.nbytes > 0
    monkeypatch.delitem(REGISTRY, "quest")
    runtime = make_runtime(policy="recency")
    assert (runtime.page_keys.nbytes, runtime.observer.positions) == (0, 1)
    assert "quest" not in runtime.policies
    runtime.page_keys.complete(np.array([1]), np.array([1]))
    assert policies.bounds_needed(LSAConfig(record="folder")), "a recording has them"


def test_trained_is_what_needs_a_checkpoint() -> None:
    assert make_runtime().indexer is None
    assert [name for name, offer in POLICIES.items() if offer.trained] == [Indexer.name, Retriever.name]
    assert isinstance(make_runtime().policies[Quest.name], Quest)


# --- recency and random ----------------------------------------------------------------------------------------------


def test_recency_prefers_later_pages() -> None:
    scores = Recency().score(Request("a", 1, Asked("recency", 0.5)), np.arange(5))
    assert (np.diff(scores) > 0).all()
    assert (scores > 0).all()
    assert len(Recency().score(Request("a", 1, Asked("recency", 0.5)), np.arange(0))) == 0


def test_random_pages_are_those_of_the_prompt_and_the_window() -> None:
    def scores(seed: int, window: int) -> list[float]:
        request = Request("a", 1, Asked("random", 0.5, False, seed), window=window)
        return Random().score(request, np.arange(8)).tolist()

    assert scores(7, 0) == scores(7, 0)
    assert scores(7, 0) != scores(7, 1)
    assert scores(7, 0) != scores(8, 0)
    assert len(scores(7, -1)) == 8
