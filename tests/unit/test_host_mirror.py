"""HostMirror: its shape, and the refusal of memory that the machine or its container has not."""

from __future__ import annotations

import math
import pathlib
from types import SimpleNamespace

import psutil
import pytest
import torch

from sglang_lsa.memory import mirror as host_mirror
from sglang_lsa.memory.mirror import GB, HostMirror, available_host_memory, require_host_memory

V2 = ("sys/fs/cgroup/memory.max", "sys/fs/cgroup/memory.current")
V1 = ("sys/fs/cgroup/memory/memory.limit_in_bytes", "sys/fs/cgroup/memory/memory.usage_in_bytes")


@pytest.fixture
def machine(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    """A folder that the mirror takes for the root of the file system; it has no control groups."""
    local = SimpleNamespace(Path=lambda path: tmp_path / str(path).lstrip("/"))
    monkeypatch.setattr(host_mirror, "pathlib", local)
    return tmp_path


def control_group(machine: pathlib.Path, files: tuple[str, str], limit: str, usage: str | None) -> None:
    for name, text in zip(files, (limit, usage), strict=True):
        if text is not None:
            (machine / name).parent.mkdir(parents=True, exist_ok=True)
            (machine / name).write_text(text + "\n")


# --- the mirror ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page_bytes", [1, 333, 4096])
def test_one_slot_for_every_virtual_page_and_the_padding_page(page_bytes: int) -> None:
    mirror = HostMirror(5, page_bytes)
    assert (mirror.pages.shape, mirror.pages.dtype) == ((6, page_bytes), torch.uint8)
    assert mirror.pages.is_contiguous()
    assert (mirror.page_bytes, mirror.nbytes) == (page_bytes, 6 * page_bytes)


def test_too_large_a_mirror_is_refused_before_it_is_allocated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "empty", lambda *_, **__: pytest.fail("allocated"))
    page_bytes = 32 * 2 * 64 * 8 * 128 * 2
    pages = 1_000_000 * GB // page_bytes
    words = r"the host mirror needs 1000000\.\d GB of host memory, [\d.]+ GB are free: lower --lsa-host-memory-gb"
    with pytest.raises(ValueError, match=words):
        HostMirror(pages, page_bytes)


@pytest.mark.parametrize("page_bytes", [1, 4096, 23_040 * 64, 1000, 8 << 20, 3 << 29])
def test_pages_are_locked_whole_and_so_are_those_of_the_system(page_bytes: int) -> None:
    mirror = HostMirror(0, page_bytes)
    at_once = mirror.locked_together * page_bytes
    assert mirror.locked_together >= 1
    assert at_once % 4096 == 0
    assert at_once <= max(host_mirror.LOCK_AT_ONCE, math.lcm(page_bytes, 4096))


# --- page-locked memory ----------------------------------------------------------------------------------------------


class Runtime:
    """Stands in for CUDA's runtime: takes note of what is locked, and refuses after ``limit`` bytes."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.locked: dict[int, int] = {}
        self.released: list[int] = []

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:
        if sum(self.locked.values()) + nbytes > self.limit:
            return 2
        self.locked[address] = nbytes
        return 0

    def cudaHostUnregister(self, address: int) -> int:
        del self.locked[address]  # only what is locked can be unlocked
        self.released.append(address)
        return 0

    def cudaGetErrorString(self, error: int) -> str:
        return {2: "out of memory"}[error]


PAGE_BYTES = 3 * 2 * 64 * 2 * 8 * 4


def lock(limit: int, monkeypatch: pytest.MonkeyPatch) -> tuple[Runtime, HostMirror]:
    """Nine pages, locked in pieces of at most 50,000 bytes."""
    runtime = Runtime(limit)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(host_mirror, "LOCK_AT_ONCE", 50_000)
    monkeypatch.setattr(host_mirror, "TOUCH_AT_ONCE", 7_000)
    monkeypatch.setattr(host_mirror, "atexit", SimpleNamespace(register=kept.append))
    kept.clear()
    return runtime, HostMirror(8, PAGE_BYTES, pinned=True)


kept: list = []
"""What the mirror wants to be called when the process ends."""


def test_a_pinned_mirror_is_locked_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime, mirror = lock(10 * PAGE_BYTES, monkeypatch)
    assert (mirror.pages.shape, mirror.nbytes) == ((9, PAGE_BYTES), 9 * PAGE_BYTES)
    assert not mirror.pages.any()
    assert mirror.locked_together == 2, "a page in two pieces could not be copied without a kernel"
    assert len(runtime.locked) == 5
    assert sorted(runtime.locked.values()) == [PAGE_BYTES, *[2 * PAGE_BYTES] * 4]
    end = mirror.pages.data_ptr()
    for address, nbytes in sorted(runtime.locked.items()):
        assert address == end, "a gap, or an overlap"
        end += nbytes
    assert end == mirror.pages.data_ptr() + mirror.nbytes
    mirror.pages[:] = 15
    assert bool((mirror.pages == 15).all())


def test_a_pinned_mirror_is_unlocked_when_the_process_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime, mirror = lock(10 * PAGE_BYTES, monkeypatch)
    count = len(runtime.locked)
    for call in kept:
        call()
    assert (runtime.locked, mirror.locked, len(runtime.released)) == ({}, [], count)
    mirror.unlock()
    assert len(runtime.released) == count


@pytest.mark.parametrize("limit", [0, 120_000], ids=["nothing", "a part"])
def test_memory_that_cannot_be_locked_is_refused(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    words = (
        r"locking 0\.0 GB of host memory failed after 0\.0 GB \(out of memory\): "
        r"lower --lsa-host-memory-gb, or raise the limit on locked memory \(ulimit -l\)"
    )
    with pytest.raises(ValueError, match=words):
        lock(limit, monkeypatch)
    runtime = torch.cuda.cudart()
    assert runtime.locked == {}
    assert len(runtime.released) == limit // 50_000
    for call in kept:
        call()
    assert len(runtime.released) == limit // 50_000, "unlocked twice"


def test_a_mirror_that_is_not_pinned_needs_no_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "cudart", lambda: pytest.fail("CUDA was asked"))
    mirror = HostMirror(5, 256)
    mirror.unlock()


# --- how much memory there is ----------------------------------------------------------------------------------------


def test_what_is_free_can_be_had() -> None:
    free = available_host_memory()
    assert 0 < free <= psutil.virtual_memory().total
    require_host_memory(free // 2, "this test", "try less")


def test_more_than_is_free_cannot() -> None:
    with pytest.raises(ValueError, match=r"this test needs [\d.]+ GB of host memory, [\d.]+ GB are free: try less"):
        require_host_memory(psutil.virtual_memory().total * 2, "this test", "try less")


def test_without_a_container_the_machine_decides(machine: pathlib.Path) -> None:
    assert available_host_memory() == pytest.approx(psutil.virtual_memory().available, rel=0.2)
    assert host_mirror._container_headroom() == []


@pytest.mark.parametrize("files", [V2, V1], ids=["v2", "v1"])
def test_a_container_leaves_what_its_limit_leaves(machine: pathlib.Path, files: tuple[str, str]) -> None:
    control_group(machine, files, limit="3000000", usage="1000000")
    assert available_host_memory() == 2_000_000
    with pytest.raises(ValueError, match="GB are free"):
        require_host_memory(2_000_001, "this test", "try less")


def test_a_container_that_is_full_leaves_nothing(machine: pathlib.Path) -> None:
    control_group(machine, V2, limit="1000", usage="3000")
    with pytest.raises(ValueError, match="GB are free"):
        require_host_memory(1, "this test", "try less")


@pytest.mark.parametrize(
    ("files", "limit"),
    [(V2, "max"), (V1, str(2**63 - 4096))],
    ids=["v2", "v1"],
)
def test_a_container_without_a_limit(machine: pathlib.Path, files: tuple[str, str], limit: str) -> None:
    control_group(machine, files, limit=limit, usage="1000000")
    assert available_host_memory() == pytest.approx(psutil.virtual_memory().available, rel=0.2)


def test_a_limit_without_a_usage_is_ignored(machine: pathlib.Path) -> None:
    control_group(machine, V2, limit="1000", usage=None)
    assert host_mirror._container_headroom() == []


def test_v1_counts_when_v2_has_no_limit(machine: pathlib.Path) -> None:
    control_group(machine, V2, limit="max", usage="5")
    control_group(machine, V1, limit="1000", usage="400")
    assert host_mirror._container_headroom() == [600]
