"""The records of the hooks: what each relies on, and that SGLang has it."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import pathlib
import pkgutil
import re
from typing import Any

import pytest
from plugin_probes import ALL, ROOT, TARGETS
from release import HOOKS

from sglang_lsa.patches.hook import Hook
from sglang_lsa.patches.releases import IncompatibleSGLang
from sglang_lsa.patches.table import INTAKE, SERVING

pytestmark = pytest.mark.release


# the records of the hooks


def hook_modules() -> list[Any]:
    files = sorted(path.stem for path in (ROOT / "patches").glob("*.py"))
    modules = [importlib.import_module(f"sglang_lsa.patches.{name}") for name in files]
    return [module for module in modules if hasattr(module, "HOOK")]


def words_of(name: str) -> list[str]:
    return [word.lower() for word in re.findall(r"[A-Z]+(?![a-z])\d*|[A-Z]?[a-z0-9]+", name)]


CALLED = [hook for hook in HOOKS if hook.kind != "attribute" and not hook.needless]


@pytest.mark.parametrize("hook", CALLED, ids=[hook.target.removeprefix("sglang.srt.") for hook in CALLED])
def test_a_hook_takes_all_that_sglang_may_hand_over(hook: Hook) -> None:
    """A parameter that a release adds may be handed over in every call, and what does not take it then fails."""
    owner, _, name = hook.target.rpartition(".")
    symbol = inspect.getattr_static(pkgutil.resolve_name(owner), name)
    parameters = inspect.signature(getattr(symbol, "__func__", symbol)).parameters.values()
    by_place = [each for each in parameters if each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD)]
    by_name = {each.name: each for each in parameters if each.kind is each.KEYWORD_ONLY}
    first = [] if hook.kind == "before" else ["result or original"]
    inspect.signature(hook.function).bind(*first, *by_place, **by_name)


@pytest.mark.parametrize("hook", ALL, ids=[hook.target.removeprefix("sglang.srt.") for hook in ALL])
def test_record(hook: Hook) -> None:
    (module,) = (module for module in hook_modules() if module.HOOK is hook)
    assert module.__file__ is not None
    assert hook.kind in ("before", "after", "around", "attribute")
    assert min(len(hook.why), len(hook.until)) > 20

    # one file per symbol, named after it; words may be left out of a long method name
    owner, method = hook.target.split(".")[-2:]
    named = words_of(pathlib.Path(module.__file__).stem)
    class_words = words_of(owner.replace("KVCache", "KvCache"))
    assert named[: len(class_words)] == class_words
    remaining = iter(words_of(method))
    assert all(word in remaining for word in named[len(class_words) :])
    assert len(named) > len(class_words)

    # the wrapper takes what it says it relies on
    parameters = inspect.signature(hook.function).parameters
    leading = {"before": (), "after": ("result",), "around": ("original",), "attribute": ("original",)}[hook.kind]
    assert tuple(parameters)[: len(leading)] == leading
    assert set(hook.parameters) <= set(parameters)

    # the test that proves it
    file, name = hook.test.split("::")
    assert re.fullmatch(r"tests/(unit|server|gpu)/test_\w+\.py", file)
    assert f"\ndef {name}(" in (ROOT / file).read_text()


def test_every_hook_file_is_in_the_table() -> None:
    listed = sorted(hook.target for hook in (*INTAKE, *SERVING))
    assert sorted(module.HOOK.target for module in hook_modules()) == listed
    assert len(set(TARGETS)) == len(TARGETS)


def test_checking_a_hook_that_fits() -> None:
    fits = Hook("json.dumps", "after", len, ("obj", "indent"), "why", "until", "test")
    fits.check()
    with pytest.raises(IncompatibleSGLang, match=r"json\.dumps takes \(obj, .*\), not 'objects'"):
        dataclasses.replace(fits, parameters=("objects",)).check()
