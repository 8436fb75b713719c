"""plan_memory: sizes of device pool and host mirror, decided before anything is allocated."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from sglang_lsa import sizing
from sglang_lsa.config import LSAConfig
from sglang_lsa.radix_ext.host_mirror import GB, available_host_memory
from sglang_lsa.sizing import HOST_SHARE, MemoryPlan, plan_memory

TOKEN_BYTES = 16384  # 65,536 tokens in a GB
PLENTY = 1 << 40


def plan(device: str = "cpu", budgeted: int = PLENTY, context: int = 8192, **options: Any) -> MemoryPlan:
    return plan_memory(
        LSAConfig(**options), token_bytes=TOKEN_BYTES, budgeted_tokens=budgeted, context_tokens=context, device=device
    )


@pytest.fixture
def ten_gb_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sizing, "available_host_memory", lambda: 10 * GB)


# --- defaults --------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("ten_gb_free")
def test_on_a_cpu_the_device_pool_is_a_quarter_of_the_mirror() -> None:
    made = plan("cpu")
    assert made.virtual_tokens == 2 * 65536 - 64
    assert made.physical_tokens == (2 * 65536 - 64) // 4 // 64 * 64
    assert made.token_bytes == TOKEN_BYTES


@pytest.mark.usefixtures("ten_gb_free")
def test_on_a_cpu_the_device_pool_holds_one_whole_context() -> None:
    made = plan("cpu", context=65536)
    assert made.physical_tokens == 65536 + 128


def test_on_a_cpu_the_device_pool_is_at_most_the_mirror() -> None:
    made = plan("cpu", host_memory_gb=0.05, context=65536)
    assert made.physical_tokens == made.virtual_tokens == 3200


@pytest.mark.usefixtures("ten_gb_free")
def test_on_a_gpu_the_device_pool_is_what_sglang_budgeted() -> None:
    made = plan("cuda", budgeted=20_000)
    assert made.virtual_tokens == 6 * 65536 - 64
    assert made.physical_tokens == 20_000 // 64 * 64


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_default_mirror_takes_its_share_of_what_is_free(device: str) -> None:
    free = available_host_memory()
    made = plan(device, budgeted=16384, context=1024)
    share = made.virtual_tokens * TOKEN_BYTES / free
    assert share == pytest.approx(HOST_SHARE[device], rel=0.2)  # others use this machine, too


# --- what was asked for ----------------------------------------------------------------------------------------------


def test_sizes_that_were_asked_for() -> None:
    made = plan(host_memory_gb=0.25, device_tokens=1000)
    assert made == MemoryPlan(physical_tokens=960, virtual_tokens=16384 - 64, token_bytes=TOKEN_BYTES)


def test_mirror_and_its_padding_page_fit_into_what_was_asked_for() -> None:
    made = plan(host_memory_gb=0.1, device_tokens=1024)
    assert (made.virtual_tokens + 64) * TOKEN_BYTES <= 0.1 * GB < (made.virtual_tokens + 128) * TOKEN_BYTES


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_device_pool_in_gb(device: str) -> None:
    assert plan(device, host_memory_gb=0.25, device_memory_gb=0.125).physical_tokens == 8192


@pytest.mark.parametrize("options", [{"device_tokens": 8192}, {"device_memory_gb": 0.125}, {}])
def test_the_device_pool_never_exceeds_what_sglang_budgeted(options: dict[str, Any]) -> None:
    assert plan(host_memory_gb=0.25, budgeted=1000, **options).physical_tokens == 960


@pytest.mark.parametrize("options", [{}, {"device_tokens": 5001}, {"device_memory_gb": 0.0777}])
@pytest.mark.parametrize("token_bytes", [1000, 23040])
def test_sizes_are_whole_pages(options: dict[str, Any], token_bytes: int) -> None:
    config = LSAConfig(host_memory_gb=0.777, **options)
    made = plan_memory(config, token_bytes=token_bytes, budgeted_tokens=12345, context_tokens=100, device="cpu")
    assert made.physical_tokens % 64 == made.virtual_tokens % 64 == 0


def test_the_plan_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="sglang_lsa"):
        plan(host_memory_gb=0.25, device_tokens=1024)
    assert "device pool 1024 tokens (0.02 GB), host mirror 16320 tokens (0.25 GB)" in caplog.text


# --- refusals --------------------------------------------------------------------------------------------------------


def test_more_host_memory_than_there_is_is_refused() -> None:
    words = r"--lsa-host-memory-gb 1000000\.0 needs 1000000\.0 GB of host memory, \d+\.\d GB are free: lower it"
    with pytest.raises(ValueError, match=words):
        plan(host_memory_gb=1_000_000.0)


@pytest.mark.parametrize("options", [{"budgeted": 255}, {"device_memory_gb": 0.003}, {"device_memory_gb": 0.0}])
def test_a_device_pool_too_small_to_serve_is_refused(options: dict[str, Any]) -> None:
    words = r"the device pool would hold \d+ tokens \(0\.00\d GB\): give it at least 256 tokens \(0\.004 GB\)"
    with pytest.raises(ValueError, match=words):
        plan(host_memory_gb=0.25, **options)


@pytest.mark.parametrize("options", [{"device_tokens": 4096}, {"device_memory_gb": 0.0625}])
def test_a_mirror_smaller_than_the_device_pool_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"the host mirror would hold 3200 tokens \(0\.05 GB\), fewer than") as caught:
        plan(host_memory_gb=0.05, **options)
    assert "raise --lsa-host-memory-gb to" in str(caught.value)


def test_the_advice_of_a_refusal_is_enough() -> None:
    with pytest.raises(ValueError, match="raise --lsa-host-memory-gb") as caught:
        plan(host_memory_gb=0.05, device_tokens=4096)
    advice = float(str(caught.value).split("--lsa-host-memory-gb to ")[1].split(" ")[0])
    made = plan(host_memory_gb=advice, device_tokens=4096)
    assert made.virtual_tokens >= made.physical_tokens == 4096


def test_no_host_memory_is_refused() -> None:
    with pytest.raises(ValueError, match="the host mirror would hold"):
        plan(host_memory_gb=0.0, device_tokens=1024)
