"""What is imported by name is wrapped where it was imported, too, and by all that wraps it."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from typing import Any

import pytest

from sglang_lsa.patches.bindings import replace, replaced_at_the_end

pytestmark = pytest.mark.release


def module(name: str, monkeypatch: pytest.MonkeyPatch, **names: Any) -> Any:
    made = types.ModuleType(name)
    vars(made).update(names)
    monkeypatch.setitem(sys.modules, name, made)
    return made


def saying(text: str) -> Callable[[], str]:
    """A new function, which nothing else has."""
    return lambda: text


def around(call: Callable[[], str]) -> str:
    return "around " + call()


def test_every_binding_is_replaced_by_the_last_wrapper(monkeypatch: pytest.MonkeyPatch) -> None:
    original, once, twice, other = map(saying, ("original", "once", "twice", "other"))
    source = module("lsa_test_source", monkeypatch, run=twice, kept=original)
    user = module("lsa_test_user", monkeypatch, run=original, also=original, later=once, other=other)
    monkeypatch.setitem(sys.modules, "lsa_test_none", None)
    replace([(original, once, source), (once, twice, source)])
    assert (user.run(), user.also(), user.later(), user.other()) == ("twice", "twice", "twice", "other")
    assert (source.run(), source.kept()) == ("twice", "original"), "where it is from, other names of it stay"


@pytest.mark.parametrize("fails", [False, True])
def test_it_is_done_at_the_end_and_then_by_sglang_again(fails: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    original = saying("original")
    source = module("lsa_test_source", monkeypatch, Has=type("Has", (), {"run": original})).Has
    user = module("lsa_test_user", monkeypatch, run=original)
    hooks = [(HookType("around"), around, None)]
    try:
        with replaced_at_the_end():
            HookRegistry._apply_target("lsa_test_source.Has.run", hooks)
            assert (source.run(), user.run()) == ("around original", "original")
            if fails:
                raise ValueError("the next one cannot be wrapped")
    except ValueError:
        assert fails
    assert (source.run(), user.run()) == ("around original", "around original")
    again = module("lsa_test_again", monkeypatch, run=user.run)
    HookRegistry._apply_target("lsa_test_source.Has.run", hooks)
    assert again.run() == "around around original"


def test_two_targets_that_are_one_function_both_wrap_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    run = saying("original")
    modules = [module(f"lsa_test_{name}", monkeypatch, run=run) for name in ("source", "user", "other")]
    with replaced_at_the_end():
        for name in ("source", "user"):
            HookRegistry._apply_target(f"lsa_test_{name}.run", [(HookType("around"), around, None)])
    assert [each.run() for each in modules] == ["around around original"] * 3


class Proxy:
    """Says that it is a module, as some lazy ones do, and has no names."""

    __slots__ = ()
    __class__ = property(lambda self: types.ModuleType)  # type: ignore[assignment]


def test_what_only_says_that_it_is_a_module_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lsa_test_proxy", Proxy())
    replace([(saying("a"), saying("b"), sys)])
