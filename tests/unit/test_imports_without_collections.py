"""Servers import SGLang without the garbage collector, and have it afterwards."""

from __future__ import annotations

import gc

import pytest

from sglang_lsa.imports import without_collections


@pytest.fixture(autouse=True)
def as_before() -> object:
    enabled = gc.isenabled()
    yield
    gc.enable() if enabled else gc.disable()


def test_there_are_no_collections_meanwhile() -> None:
    gc.enable()
    frozen = gc.get_freeze_count()
    with without_collections():
        assert not gc.isenabled()
    assert gc.isenabled()
    assert gc.get_freeze_count() > frozen, "what was imported is not searched again"


def test_there_are_some_after_an_import_that_failed() -> None:
    gc.enable()
    with pytest.raises(ImportError), without_collections():
        raise ImportError
    assert gc.isenabled()


def test_who_wants_none_has_none() -> None:
    gc.disable()
    with without_collections():
        pass
    assert not gc.isenabled()
