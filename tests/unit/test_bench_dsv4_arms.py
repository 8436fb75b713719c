"""``bench dsv4`` without a GPU: shapes, what of them fits, and the servers that are started for it."""

from __future__ import annotations

import json
import pathlib

import pytest
from bench_dsv4 import RANK, VOCABULARY, asked_of, planned

from sglang_lsa.bench import dsv4_arms, dsv4_measure
from sglang_lsa.bench.dsv4_arms import DSV4_ARMS, DSV4_SYSTEMS, Dsv4Arm
from sglang_lsa.memory.layout.dsv4 import PAGE_TOKENS

GB = 1 << 30


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


@pytest.mark.usefixtures("roomy")
@pytest.mark.parametrize("name", DSV4_SYSTEMS)
def test_a_server_gets_the_window_and_the_mirror_of_its_plan(name: str) -> None:
    system, arm = DSV4_SYSTEMS[name], DSV4_ARMS["512k"]
    found = planned("512k", name)
    flags = dsv4_measure.arguments(asked_of(), arm, system, found, pathlib.Path("model"))
    assert ("--swa-full-tokens-ratio" in flags) == (name != "stock")
    assert ("--lsa-host-memory-gb" in flags) == system.lsa == any(flag.startswith("--lsa") for flag in flags)
    assert flags[flags.index("--max-running-requests") + 1] == str(found.requests)
    assert int(flags[flags.index("--context-length") + 1]) > arm.context + 64
