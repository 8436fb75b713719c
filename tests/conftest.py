"""The order of the tests, and which of them belong together.

Two processes run them (``pytest -n 2``). Tests that share a server follow each other in one of the two, so that it is
started once and can end after the last of them; other tests of one file stay together.
"""

from __future__ import annotations

import gc
import pathlib
from collections.abc import Iterable, Iterator

import pytest

gc.disable()  # what is imported and collected stays: it would be searched for garbage again and again

SHARED = ("keyed", "stock", "whole", "lsa", "small")
"""Servers that many files use (``tests/server/conftest.py``), in the order in which they come and go."""
HERE = pathlib.Path(__file__).parent


LONGEST = ("small", "whole", "lsa", "test_tensor_parallel", "test_adapt", "test_simulation", "test_unified_cache")
"""Groups that begin first, so that no process ends with a long one after the other had its last."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--new-processes", action="store_true", help="start every server as users do, each of which imports SGLang"
    )


def pytest_itemcollected(item: pytest.Item) -> None:
    item.add_marker(pytest.mark.xdist_group(group(item)))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Those with servers go first, which take longest, then everything else. A server that two need goes after the
    first of them."""
    groups = [*LONGEST, *dict.fromkeys(group(item) for item in items)]
    items.sort(key=lambda item: (not item.get_closest_marker("server"), groups.index(group(item)), *order(item)))


def group(item: pytest.Item) -> str:
    """A shared server, else the file; files in a folder of their own have servers in common."""
    if shared := shared_servers(item):
        return shared[-1]
    inner = len(item.path.relative_to(HERE).parts) > 2
    return item.path.parent.name if inner else item.path.stem


def order(item: pytest.Item) -> tuple[int, int]:
    shared = shared_servers(item)
    return max((SHARED.index(name) for name in shared), default=-1), -len(shared)


def shared_servers(item: pytest.Item) -> list[str]:
    """The shared servers that a test asks for, in their order; what other folders call so is theirs."""
    names = getattr(item, "fixturenames", ()) if item.path.parent == HERE / "server" else ()
    return [name for name in SHARED if name in names]


class LastUse:
    """The last test of this process, in order, that needs each shared server; filled once all tests are known."""

    def __init__(self) -> None:
        self.tests: dict[str, pytest.Item] = {}

    def note(self, items: Iterable[pytest.Item]) -> None:
        for item in items:
            self.tests.update(dict.fromkeys(shared_servers(item), item))

    def ends_with(self, item: pytest.Item) -> list[str]:
        return [name for name, last in self.tests.items() if last is item]


def pytest_configure(config: pytest.Config) -> None:
    config.stash[LAST_USE] = LastUse()


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[object]:
    """Afterwards there is a garbage collector: also in the process that has others collect, and after errors."""
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_collection_finish(session: pytest.Session) -> None:
    session.config.stash[LAST_USE].note(session.items)


@pytest.fixture
def last_of(request: pytest.FixtureRequest) -> list[str]:
    """Shared servers that no later test needs."""
    return request.config.stash[LAST_USE].ends_with(request.node)


LAST_USE = pytest.StashKey[LastUse]()
