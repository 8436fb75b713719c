"""The plugin in real SGLang processes: absent without flags, whole with them, refused where it cannot work.

Importing SGLang takes most of the time, so two probes (this file, run as a script) collect what many tests look at.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json
import logging
import multiprocessing
import os
import pathlib
import pickle
import pkgutil
import re
import runpy
import subprocess
import sys
import time
import types
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from release import HERE, HOOKS, RELEASE, MadeUp, in_force, prepared

from sglang_lsa.config import AUTO, PAGE_SIZE, LSAConfig, RequestOptions
from sglang_lsa.doctor.findings import OK
from sglang_lsa.doctor.hooks import hook_finding
from sglang_lsa.engine.admission import Admission, Admitted
from sglang_lsa.engine.arrival import Arrival, Verdict
from sglang_lsa.engine.lookahead import Lookahead
from sglang_lsa.engine.policies import Recency
from sglang_lsa.engine.prefill import DevicePoolFull
from sglang_lsa.engine.reading import IN_PLACE, STREAMED
from sglang_lsa.engine.step import Step
from sglang_lsa.indexer.checkpoint import ModelShape, config_from_json
from sglang_lsa.indexer.model import MemoryIndexer
from sglang_lsa.memory.layout.mha import MhaLayout
from sglang_lsa.memory.pager import Pager
from sglang_lsa.memory.resident_table import ResidentTable
from sglang_lsa.patches import (
    compatibility,
    model_runner_forward,
    scheduler_add_request_to_queue,
    scheduler_run_batch,
    uvicorn_run,
)
from sglang_lsa.patches.compatibility import (
    REFUSED_FLAGS,
    REFUSED_SINCE_0_5_22,
    Unsupported,
    apply_defaults,
    attach,
    device_problems,
    flash_attention_problem,
)
from sglang_lsa.patches.groups import with_groups
from sglang_lsa.patches.hook import Hook
from sglang_lsa.patches.models import shape_of
from sglang_lsa.patches.prefill_adder_add_chunked_req import add_chunked_req
from sglang_lsa.patches.prefill_adder_add_one_req import add_one_req
from sglang_lsa.patches.releases import IncompatibleSGLang
from sglang_lsa.patches.requests import promise
from sglang_lsa.patches.resolved import proof_of_life, remember
from sglang_lsa.patches.scheduler_get_new_batch_prefill_raw import Pass
from sglang_lsa.patches.table import INTAKE, SERVING
from sglang_lsa.patches.table import install as install_hooks

pytestmark = pytest.mark.release

ROOT = pathlib.Path(__file__).resolve().parents[2]
ALL = HOOKS
WITH_SUPPORT = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "tests" / "support"), *sys.path])}
TARGETS = sorted(hook.target for hook in ALL)
INTAKE_TARGETS = sorted(hook.target for hook in INTAKE if hook in HOOKS)


# --- probe "stock": a process without flags, and installations that must fail ----------------------------------------


def wrappers(target: str) -> list[Callable[..., Any]]:
    """Functions that the symbol is wrapped in, outermost first; empty when its module was not even imported."""
    names = target.split(".")
    modules = [".".join(names[:end]) for end in range(len(names), 0, -1)]
    if (module := next((name for name in modules if name in sys.modules), None)) is None:
        return []
    symbol: Any = sys.modules[module]
    for name in names[module.count(".") + 1 :]:
        symbol = getattr(symbol, name, None)
    found = []
    symbol = getattr(symbol, "__func__", symbol)
    while hasattr(symbol, "__wrapped__"):
        found += [
            cell.cell_contents for cell in symbol.__closure__ or () if cell.cell_contents is not symbol.__wrapped__
        ]
        symbol = symbol.__wrapped__
    return [function for function in found if inspect.isfunction(function)]


def installed() -> list[str]:
    """Targets of our hooks that are wrapped in this process, or registered to be wrapped."""
    from sglang.srt.plugins.hook_registry import HookRegistry

    registered = {
        target
        for target, hooks in HookRegistry._hooks.items()
        for _, function, _ in hooks
        if function.__module__.startswith("sglang_lsa.")
    }
    return sorted(registered | set(wrapped()))


def wrapped() -> list[str]:
    """Targets of our hooks that are wrapped in this process."""
    return sorted(hook.target for hook in ALL if hook.function in wrappers(hook.target) or is_set(hook))


def is_set(hook: Any) -> bool:
    """Whether an attribute of a class has our value in this process."""
    owner, _, name = hook.target.rpartition(".")
    module, _, name_of_class = owner.rpartition(".")
    value = getattr(getattr(sys.modules.get(module), name_of_class, None), name, None)
    return hook.kind == "attribute" and getattr(value, "__module__", None) == hook.function.__module__


def lost() -> list[str]:
    """Targets that another plugin wanted to wrap, and did not."""
    from sglang.srt.plugins.hook_registry import HookRegistry

    registered = [(target, function) for target, hooks in HookRegistry._hooks.items() for _, function, _ in hooks]
    return sorted(
        f"{target} by {function.__module__}" for target, function in registered if function not in wrappers(target)
    )


def other_hook(result: Any, *_: Any, **__: Any) -> Any:
    return result


def load_plugins_again() -> None:
    from sglang.srt import plugins

    plugins._plugins_loaded = False
    plugins.load_plugins()


def failure(call: Callable[[], Any]) -> dict[str, Any]:
    """What ``call`` raised, and the hooks that are there afterwards."""
    try:
        call()
        kind, text = "none", ""
    except BaseException as error:  # SystemExit is what the plugin raises
        kind, text = type(error).__name__, str(error)
    return {"kind": kind, "text": text, "installed": installed()}


def stock_probe() -> dict[str, Any]:
    found: dict[str, Any] = {}
    executed: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: executed.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("sglang.srt.plugins").addHandler(handler)
    logging.getLogger("sglang.srt.plugins").setLevel(logging.INFO)

    import sglang
    from sglang.srt import server_args
    from sglang.srt.plugins.hook_registry import HookRegistry

    from sglang_lsa.patches.table import install

    def stop(argv: list[str]) -> None:
        found["command"] = installed()
        found["module_name"] = sys.modules["__main__"].__spec__.name  # type: ignore[union-attr]
        raise SystemExit

    # `python -m sglang.launch_server --model-path m`, up to the point where it reads its arguments
    original, server_args.prepare_server_args = server_args.prepare_server_args, stop
    sys.argv = ["-m", "--model-path", "m"]
    try:
        runpy.run_module("sglang.launch_server", run_name="__main__", alter_sys=True)
    except SystemExit:
        server_args.prepare_server_args = original
    found["executed"] = executed

    # `sglang serve --model-path m`
    sys.argv = ["/usr/bin/sglang", "serve", "--model-path", "m"]
    load_plugins_again()
    found["console"] = installed()

    # a child process of either
    parent, child = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=stock_child, args=(child,))
    process.start()
    found["child"] = parent.recv()
    process.join()

    found["checks"] = {hook.target: failure(hook.check)["text"] for hook in ALL}

    sys.argv = ["/usr/bin/sglang", "serve", "--lsa-budget", "0.2"]
    sglang.__version__ = "0.5.18"
    found["version"] = failure(load_plugins_again)
    sglang.__version__ = HERE

    changed = dataclasses.replace(SERVING[-1], parameters=("self", "no_such_parameter"))
    found["signature"] = failure(lambda: install((*ALL[:-1], changed)))
    for name, target in (("method", SERVING[0].target + "_gone"), ("module", "sglang.srt.gone.Class.method")):
        gone = dataclasses.replace(SERVING[0], target=target)
        found[name] = failure(partial(install, (*ALL, gone)))

    def broken(*_: Any) -> None:
        raise RuntimeError("broken")

    apply = HookRegistry.__dict__["_apply_target"]
    HookRegistry._apply_target = broken
    found["apply"] = failure(lambda: install(SERVING[:1]))
    HookRegistry._apply_target = apply
    HookRegistry.reset()

    # another program that may build an Engine
    sys.argv = ["program.py"]
    load_plugins_again()
    found["library"] = installed()

    HookRegistry.register("sglang.srt.managers.scheduler.Scheduler.run_batch", other_hook)
    HookRegistry.apply_hooks()
    found["other plugin"] = failure(lambda: install(ALL)) | {"wrapped": wrapped(), "lost": lost()}
    return found


def stock_child(pipe: Any) -> None:
    from sglang_lsa.plugin import register

    register()
    pipe.send({"main": sys.modules["__main__"].__name__, "argv": sys.argv[1:], "installed": installed()})


# --- probe "flags": arguments, refusals, and a child that gets them --------------------------------------------------


ACCEPTED: dict[str, list[str]] = {
    "plain": ["--lsa-budget", "0.25", "--lsa-policy", "recency", "--lsa-observe-layers", "3,9"],
    "own sizes": ["--lsa-window", "32", "--max-running-requests", "7", "--chunked-prefill-size", "512"],
    "no tree": ["--lsa-budget", "0.25", "--disable-radix-cache"],
    "stock": ["--device", "cpu"],
}

REFUSED: list[tuple[str, str]] = [
    # (flags, words of the refusal)
    ("--disaggregation-mode prefill", "--disaggregation-mode prefill: .*remove --disaggregation-mode"),
    ("--dcp-size 2", "--dcp-size 2: .*remove --dcp-size"),
    ("--pp-size 2", "--pp-size 2: .*use --pp-size 1"),
    ("--tp-size 2", "--tp-size 2: .*use --tp-size 1"),
    ("--dp-size 2", "--dp-size 2: .*use --dp-size 1 and several servers behind a router"),
    ("--nnodes 2", "--nnodes 2: .*use one node"),
    ("--enable-hierarchical-cache", "--enable-hierarchical-cache True: .*remove --enable-hierarchical-cache"),
    ("--enable-lmcache", "--enable-lmcache True: .*remove --enable-lmcache"),
    ("--enable-flexkv", "--enable-flexkv True: .*remove --enable-flexkv"),
    ("--enable-hisparse", "--enable-hisparse True: .*remove --enable-hisparse: LSA replaces it"),
    ("--enable-memory-saver", "--enable-memory-saver True: .*remove"),
    ("--enable-mixed-chunk", "--enable-mixed-chunk True: .*remove"),
    ("--enable-torch-compile", "--enable-torch-compile True: .*remove"),
    ("--enable-pdmux", "--enable-pdmux True: .*remove"),
    ("--enable-two-batch-overlap", "--enable-two-batch-overlap True: .*remove"),
    ("--enable-streaming-session", "--enable-streaming-session True: .*remove"),
    ("--enable-session-radix-cache", "--enable-session-radix-cache True: .*remove"),
    ("--is-embedding", "--is-embedding True: .*serve embedding models without LSA"),
    ("--page-size 32", "--page-size 32: .*use --page-size 64 or leave it out"),
    ("--page-size 1", "--page-size 1: .*use --page-size 64"),
    ("--radix-cache-backend other", "--radix-cache-backend other: .*remove --radix-cache-backend"),
    ("--enable-return-routed-experts", "--enable-return-routed-experts True: .*remove"),
    ("--kv-canary log", "--kv-canary log: .*remove --kv-canary"),
    ("--device cuda", "--device cuda: .*use --device cpu"),
    ("--attention-backend triton", "--attention-backend triton: .*use torch_native"),
    ("--prefill-attention-backend triton", "--prefill-attention-backend triton: .*use|remove"),
    ("--decode-attention-backend triton", "--decode-attention-backend triton: .*use|remove"),
    ("--lsa-indexer /does/not/exist", "--lsa-indexer /does/not/exist: has no config.json: give a folder"),
    ("--lsa-observe-layers 3,99", "--lsa-observe-layers .*99.*the model has layers 0 to 29"),
    ("--lsa-budget 7", r"budget 7\.0 is out of range: use a number in \(0, 1\]"),
    ("--lsa-policy indexer", "--lsa-policy indexer needs a trained checkpoint: add --lsa-indexer PATH"),
    ("--lsa-config /does/not/exist.json", "--lsa-config /does/not/exist.json: cannot be read .*give an existing"),
    ("--tp-size 2 --page-size 16", "(?s)--page-size 16: .*--tp-size 2: "),  # every problem at once
    # SGLang's own checks come first:
    ("--enable-page-major-kv-layout", "--enable-page-major-kv-layout (requires|without)"),
    ("--enable-deterministic-inference", "deterministic inference"),
    ("--enable-prefill-cp", "--enable-prefill-cp is enabled"),
    ("--attn-cp-size 2", "attn_cp_size"),
]

DEFAULTS = (
    "device",
    "page_size",
    "attention_backend",
    "sampling_backend",
    "radix_cache_backend",
    "chunked_prefill_size",
    "max_running_requests",
    "sleep_on_idle",
    "disable_radix_cache",
)


def describe(server_args: Any) -> dict[str, Any]:
    config = getattr(server_args, "lsa_config", None)
    seen = {name: getattr(server_args, name) for name in DEFAULTS}
    return seen | {"lsa_config": config and json.loads(config.to_json())}


def flags_probe() -> dict[str, Any]:
    sys.argv[1:] = ["--lsa-budget", "0.25"]
    from sglang.srt.plugins import load_plugins

    load_plugins()
    sys.argv[1:] = []  # children inherit these; what tells them is the pickle alone
    from sglang.srt.plugins.hook_registry import HookRegistry

    found: dict[str, Any] = {"wrapped": wrapped(), "lost": lost()}
    HookRegistry.register("sglang.srt.managers.scheduler.Scheduler.run_batch", other_hook)
    HookRegistry.apply_hooks()
    found["lost later"] = lost()

    from sglang.srt.entrypoints.engine import Engine
    from sglang.srt.server_args import prepare_server_args

    from sglang_lsa.embedded_model import embedded_model_path

    model = str(embedded_model_path())
    common = ["--model-path", model, "--log-level", "warning"]
    server_args = prepare_server_args([*common, *ACCEPTED["plain"]])
    in_force(server_args)
    parent, child = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=flags_child, args=(child, server_args))
    process.start()

    for name, flags in ACCEPTED.items():
        found[name] = describe(prepared([*common, *flags]))
    for given, _ in REFUSED:
        argv = [*common, "--lsa-budget", "0.25", *given.split()]
        found[given] = failure(partial(prepared, argv))["text"]
    found["engine"] = describe(in_force(Engine.server_args_class(model_path=model, lsa_config={"budget": 0.25})))
    found["stock engine"] = describe(in_force(Engine.server_args_class(model_path=model, device="cpu")))
    found["bad engine"] = failure(lambda: Engine.server_args_class(model_path=model, lsa_config={"budgets": 0.25}))
    found["model code"] = [name for name in sys.modules if name == "sglang.srt.models.llama"]
    found["child"] = parent.recv()
    process.join()
    return found


def flags_child(pipe: Any, server_args: Any) -> None:
    before = sorted(name for name in sys.modules if name == "sglang_lsa.plugin")
    from sglang.srt.plugins import load_plugins

    load_plugins()
    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS
    from sglang.srt.mem_cache import registry

    backends = [ATTENTION_BACKENDS[name].__module__ for name in ("torch_native", "flashinfer", "fa3")]
    backends += [name for values in vars(registry).values() if isinstance(values, dict) for name in values]
    pipe.send(
        {
            "argv": sys.argv[1:],
            "before": before,
            "wrapped": wrapped(),
            "backends": backends,
            **describe(in_force(server_args)),
        }
    )


# --- the tests -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def probes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], dict[str, Any]]]:
    """Both probes, side by side; called with a name, returns what that one found."""
    folder = tmp_path_factory.mktemp("probes")
    running = {}
    for name in ("flags", "stock"):
        log = (folder / f"{name}.log").open("w")
        command = [sys.executable, __file__, name, str(folder / f"{name}.json")]
        running[name] = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=folder, env=WITH_SUPPORT)
    found: dict[str, dict[str, Any]] = {}

    def result(name: str) -> dict[str, Any]:
        if name not in found:
            running[name].wait(timeout=600)
            file = folder / f"{name}.json"
            assert file.exists(), (folder / f"{name}.log").read_text()[-3000:]
            found[name] = json.loads(file.read_text())
        return found[name]

    yield result
    for process in running.values():
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def stock(probes: Callable[[str], dict[str, Any]]) -> dict[str, Any]:
    return probes("stock")


@pytest.fixture(scope="module")
def flags(probes: Callable[[str], dict[str, Any]]) -> dict[str, Any]:
    return probes("flags")


# flags


def test_flags_reach_server_args(flags: dict[str, Any]) -> None:
    expected = LSAConfig(budget=0.25, policy="recency", observe_layers=(3, 9))
    assert LSAConfig(**flags["plain"]["lsa_config"]) == expected
    assert LSAConfig(**flags["own sizes"]["lsa_config"]) == LSAConfig(window=32)


def test_flags_install_every_hook(flags: dict[str, Any]) -> None:
    assert flags["wrapped"] == TARGETS


def test_what_the_user_left_open_is_filled_in(flags: dict[str, Any]) -> None:
    assert {name: flags["plain"][name] for name in DEFAULTS} == {
        "device": "cpu",
        "page_size": 64,
        "attention_backend": "torch_native",
        "sampling_backend": "pytorch",
        "radix_cache_backend": "lsa",
        "chunked_prefill_size": 2048,
        "max_running_requests": 256,
        "sleep_on_idle": True,
        "disable_radix_cache": False,
    }


def test_what_the_user_gave_is_kept(flags: dict[str, Any]) -> None:
    assert flags["own sizes"]["max_running_requests"] == 7
    assert flags["own sizes"]["chunked_prefill_size"] == 512
    assert flags["no tree"]["disable_radix_cache"] is True


def test_hooks_without_flags_change_no_argument(flags: dict[str, Any]) -> None:
    assert flags["stock"]["lsa_config"] is None
    assert flags["stock"]["radix_cache_backend"] is None
    assert flags["stock"]["page_size"] == 1
    assert flags["stock engine"]["lsa_config"] is None
    assert flags["stock engine"]["page_size"] == 1


def test_engine_takes_a_config(flags: dict[str, Any]) -> None:
    assert LSAConfig(**flags["engine"]["lsa_config"]) == LSAConfig(budget=0.25)
    names = [name for name in DEFAULTS if name != "lsa_config"]
    assert {name: flags["engine"][name] for name in names} == {name: flags["plain"][name] for name in names}
    assert flags["bad engine"]["kind"] == "ValueError"
    assert "lsa_config: unknown key 'budgets': use one of" in flags["bad engine"]["text"]


def test_pickled_arguments_install_the_hooks_in_a_child(flags: dict[str, Any]) -> None:
    child = flags["child"]
    assert child["argv"] == []  # nothing else could have told it
    assert child["before"] == []
    assert child["wrapped"] == TARGETS
    assert child["lsa_config"] == flags["plain"]["lsa_config"]
    assert child["backends"][:2] == ["sglang_lsa.plugin"] * 2
    assert "lsa" in child["backends"]


@pytest.mark.parametrize(("given", "words"), REFUSED, ids=[given for given, _ in REFUSED])
def test_unsupported_flags_are_refused(flags: dict[str, Any], given: str, words: str) -> None:
    assert re.search(words, flags[given]), flags[given] or "accepted"


def test_refusals_come_before_anything_is_loaded(flags: dict[str, Any]) -> None:
    assert flags["model code"] == []


# what is new


@pytest.mark.skipif(not RELEASE.resolves_late, reason="this SGLang has none of it")
@pytest.mark.parametrize("name", [name for name, _, _ in REFUSED_SINCE_0_5_22])
def test_what_is_new_is_refused(name: str) -> None:
    fine = dict((flag, value) for flag, value, _ in REFUSED_SINCE_0_5_22)[name]
    with pytest.raises(Unsupported, match=f"--{name.replace('_', '-')} "):
        attach(arguments(**{name: not fine if isinstance(fine, bool) else 2}), LSAConfig())


@pytest.mark.skipif(not RELEASE.resolves_late, reason="this SGLang has none of it")
def test_what_is_new_and_no_flag_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Unsupported, match="--radix-eviction-policy tlru"):
        attach(arguments(radix_eviction_policy="tlru"), LSAConfig())
    monkeypatch.setenv("SGLANG_RUST_SERVER", "1")
    with pytest.raises(Unsupported, match="SGLANG_RUST_SERVER"):
        attach(arguments(), LSAConfig())


@pytest.mark.skipif(RELEASE.deepseek_v4, reason="this SGLang's can be paged")
def test_deepseek_v4_is_refused_and_told_which_release_has_it() -> None:
    other = SimpleNamespace(architectures=["DeepseekV4ForCausalLM"])
    with pytest.raises(Unsupported, match=r"use SGLang 0\.5\.17"):
        attach(arguments(model={"hf_config": other}), LSAConfig())


def test_a_dead_hook_is_found_by_proof_of_life() -> None:
    """A hook can be installed on what SGLang never calls: a Struct has no use for its ``__init__``."""
    import msgspec

    class Arguments(msgspec.Struct, dict=True):
        model_path: str

    called = []
    Arguments.__init__ = lambda self, *_, **__: called.append(self)  # type: ignore[method-assign]
    made = Arguments("model")
    assert called == [], "it is dead"
    with pytest.raises(IncompatibleSGLang, match=r"from_cli_args was never called through its hook: the --lsa flags"):
        proof_of_life(made)
    remember(made, "lsa_config", LSAConfig())
    with pytest.raises(IncompatibleSGLang, match=r"resolve_once was never called .*these arguments were not checked"):
        proof_of_life(made)
    remember(made, "lsa_checked", True)
    assert proof_of_life(pickle.loads(pickle.dumps(SimpleNamespace(**vars(made))))).lsa_config == LSAConfig()


def test_processes_that_have_nothing_to_do_get_nothing() -> None:
    script = (
        "import sys; from setproctitle import setproctitle; setproctitle(sys.argv[1])\n"
        "sys.argv[1:] = ['--lsa-budget=1']\n"
        "from sglang_lsa.plugin import register; register(); print('sglang_lsa.patches.table' in sys.modules)"
    )
    for title, expected in (("sglang::detokenizer", "False"), ("sglang::data_parallel_controller", "False")):
        done = subprocess.run([sys.executable, "-c", script, title], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == expected


# no flags


@pytest.mark.parametrize("how", ["command", "console"])
def test_no_flags_installs_nothing(stock: dict[str, Any], how: str) -> None:
    assert stock["module_name"] == "sglang.launch_server"
    assert any("Executed general plugin: lsa" in line for line in stock["executed"])
    assert stock[how] == []


def test_no_flags_installs_nothing_in_children(stock: dict[str, Any]) -> None:
    assert stock["child"]["main"] == "__mp_main__"
    assert stock["child"]["installed"] == []


def test_a_program_that_may_build_an_engine_gets_the_intake_only(stock: dict[str, Any]) -> None:
    assert stock["library"] == INTAKE_TARGETS


# all or nothing


def test_every_hook_target_exists(stock: dict[str, Any]) -> None:
    assert stock["checks"] == dict.fromkeys(sorted(stock["checks"]), "")
    assert sorted(stock["checks"]) == TARGETS


@pytest.mark.parametrize(
    ("case", "kind", "words"),
    [
        (
            "version",
            "SystemExit",
            "sglang-lsa: sglang is version 0.5.18; .* written for SGLang 0.5.17 or 0.5.23",
        ),
        ("signature", "IncompatibleSGLang", r"takes \(self, .*\), not 'no_such_parameter'"),
        ("method", "IncompatibleSGLang", "_gone not found"),
        ("module", "IncompatibleSGLang", "sglang.srt.gone.Class.method not found"),
    ],
)
def test_all_or_nothing(stock: dict[str, Any], case: str, kind: str, words: str) -> None:
    assert stock[case]["kind"] == kind
    assert re.search(words, stock[case]["text"])
    fix = "Install it (pip install sglang==0.5.17), or start without --lsa flags."
    assert stock[case]["text"].endswith(fix)
    assert stock[case]["installed"] == []


def test_a_hook_that_sglang_could_not_apply_is_an_error(stock: dict[str, Any]) -> None:
    assert stock["apply"]["kind"] == "IncompatibleSGLang"
    assert re.search(r"could not wrap sglang\.srt\..*\.config_from_budget", stock["apply"]["text"])


def test_a_hook_that_sglang_would_skip_is_installed_or_an_error(stock: dict[str, Any]) -> None:
    """Another plugin wrapped the target and applied that: SGLang would not wrap it again, and say nothing."""
    seen = stock["other plugin"]
    assert seen["kind"] == "IncompatibleSGLang" or seen["wrapped"] == TARGETS


def test_hooks_of_other_plugins_are_kept(flags: dict[str, Any]) -> None:
    """SGLang itself depends on a package with plugins; which of them runs first is a matter of luck."""
    assert flags["lost"] == []
    assert flags["lost later"] == []


def test_a_hook_on_what_sglang_does_without_is_left_out() -> None:
    """Without the package that it needs SGLang disables the part, and says so; its server starts all the same."""
    (hook,) = [hook for hook in SERVING if hook.target.endswith(".create_responses")]
    assert not hook.needless
    gone = dataclasses.replace(hook, target="sglang.srt.gone.Class.method", needs="no_such_package_of_anybody")
    assert gone.needless and gone.problem() is not None
    assert not dataclasses.replace(gone, needs="").needless
    install_hooks([gone])
    install_hooks([gone])
    assert hook_finding(gone).status == OK


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


# the hooks of admission, with SGLang's adder as far as they look at it


DEVICE_PAGES = 24


class Adder(SimpleNamespace):
    """Puts a prefill batch together: SGLang's own part takes every prompt, as much of it as fits the chunk."""

    def __init__(self, chunk: int | None, running: int = 0) -> None:
        keys, values = ([torch.zeros((DEVICE_PAGES + 1) * PAGE_SIZE, 1, 1)] for _ in range(2))
        pager = Pager(MhaLayout(keys, values, PAGE_SIZE), 200)
        config = LSAConfig(policy="recency", budget=0.5, min_pages=1, min_context=4 * PAGE_SIZE)
        lookahead = Lookahead(config, pager, ResidentTable(4, 13, PAGE_SIZE), {"recency": Recency()})
        admission = Admission(pager, lookahead.rules, chunk)
        super().__init__(
            tree_cache=SimpleNamespace(
                lsa=SimpleNamespace(admission=admission, pager=pager), scheduling_pass=Pass(None)
            ),
            running_batch=SimpleNamespace(reqs=[object()] * running) if running else None,
            can_run_list=[],
            rem_chunk_tokens=chunk,
            rem_total_tokens=100_000.0,
        )
        self.admission, self.pager = admission, pager
        self.seen: list[int | None] = []
        """Tokens of a chunk that SGLang's own part was left."""
        self.refuses = False

    def hold(self, pages: int) -> None:
        self.pager.ledger.allocate(range(1, pages + 1))
        assert self.pager.hold("running", range(1, pages + 1))

    def original(self, adder: Adder, req: Any, *args: Any, **kwargs: Any) -> Any:
        assert adder is self
        self.seen.append(self.rem_chunk_tokens)
        if self.refuses:
            return "refused"
        self.can_run_list.append(req)
        return ("taken", args, kwargs)

    def add_one(self, req: Any, *args: Any, **kwargs: Any) -> Any:
        return add_one_req(self.original, self, req, *args, **kwargs)

    def add_chunked(self, req: Any) -> Any:
        return add_chunked_req(self.original, self, req)


def prompt(pages: int, rid: str = "a") -> SimpleNamespace:
    return MadeUp(
        rid=rid,
        full_untruncated_fill_ids=[7] * pages * PAGE_SIZE,
        prefix_indices=torch.zeros(0, dtype=torch.int64),
        sampling_params=SimpleNamespace(custom_params=None),
    )


@pytest.mark.parametrize(
    ("chunk", "pages", "kind", "seen"),
    [
        pytest.param(8192, 3, IN_PLACE, 8192, id="in place"),
        pytest.param(8192, 60, STREAMED, 12 * PAGE_SIZE, id="streamed, half of the pool at most"),
        pytest.param(256, 60, STREAMED, 256, id="streamed, in small chunks"),
        pytest.param(None, 23, IN_PLACE, None, id="no chunks"),
    ],
)
def test_a_streamed_prompt_bounds_its_chunk(chunk: int | None, pages: int, kind: str, seen: int | None) -> None:
    adder, req = Adder(chunk), prompt(pages)
    assert adder.add_one(req, False, truncation=True) == ("taken", (False,), {"truncation": True})
    assert adder.seen == [seen]
    assert adder.rem_chunk_tokens == seen
    assert adder.admission.admitted[req.rid].how == kind
    assert adder.pager.reservations.owed(req.rid) == adder.admission.admitted[req.rid].demand


def test_a_prompt_that_sglang_does_not_take_is_promised_nothing() -> None:
    adder = Adder(256)
    adder.refuses = True
    assert adder.add_one(prompt(3)) == "refused"
    assert (adder.admission.admitted, adder.pager.reservations.total) == ({}, 0)
    adder.refuses = False
    adder.add_one(prompt(60))
    assert adder.admission.admitted["a"].how == STREAMED, "it is alone: the other was not taken"


def test_a_prompt_that_the_pool_cannot_take_now_leaves_admission_open() -> None:
    """SGLang's NO_TOKEN would close it until a request ends."""
    from sglang.srt.managers.schedule_policy import AddReqResult

    adder = Adder(256)
    adder.hold(20)
    assert adder.add_one(prompt(60)) is AddReqResult.OTHER
    assert (adder.seen, adder.pager.reservations.total) == ([], 0)
    assert adder.rem_chunk_tokens == 256
    assert adder.add_one(prompt(3, "short"))[0] == "taken"


@pytest.mark.parametrize(("running", "fits"), [(0, 9), (4, 5)])
def test_a_prompt_leaves_a_page_for_every_other_request(running: int, fits: int) -> None:
    """Those that decode, and those admitted in the same pass."""
    adder = Adder(8192, running)
    adder.hold(10)
    assert adder.add_one(prompt(3, "first"))[0] == "taken"
    assert adder.add_one(prompt(fits, "second"))[0] == "taken"
    assert adder.admission.admitted["second"].how == IN_PLACE
    assert adder.pager.unpromised_pages == 14 - 3 - fits == running + 2
    assert adder.add_one(prompt(1, "third")) is not None
    assert "third" not in adder.admission.admitted


def test_prompts_that_are_computed_alone() -> None:
    """Whoever comes first; a chunk of a streamed prompt that is under way comes first of all."""
    from sglang.srt.managers.schedule_policy import AddReqResult

    adder = Adder(256)
    adder.add_one(prompt(3, "short"))
    assert adder.add_one(prompt(60, "long")) is AddReqResult.OTHER
    other = Adder(256)
    other.add_one(prompt(60, "long"))
    assert other.add_one(prompt(3, "short")) is AddReqResult.OTHER
    chunked = Adder(256)
    long = prompt(60, "long")
    promise(chunked.admission, long, Admitted(STREAMED, long.prefix_indices.numpy(), 12, 256))
    chunked.add_chunked(long)
    assert chunked.add_one(prompt(3, "short")) is AddReqResult.OTHER
    for each in (adder, other, chunked):
        assert (len(each.can_run_list), each.admission.waits) == (1, 0)


@pytest.mark.parametrize(
    ("chunk", "promised", "total", "seen"),
    [
        pytest.param(8192, 256, 100_000.0, 256, id="what was promised"),
        pytest.param(256, 512, 100_000.0, 256, id="SGLang's chunk is smaller"),
        pytest.param(8192, None, 100_000.0, 8192, id="in place"),
        pytest.param(1000, None, 100_000.0, 960, id="a chunk ends with a page"),
        pytest.param(8192, None, 700.5, 640, id="few slots are left"),
        pytest.param(8192, 256, 100.0, 64, id="one page of slots is left"),
        pytest.param(8192, None, 63.0, 8192, id="less than a page is left: up to SGLang"),
        pytest.param(8192, 256, -20.0, 256, id="nothing is left: up to SGLang"),
    ],
)
def test_the_next_chunk(chunk: int, promised: int | None, total: float, seen: int) -> None:
    adder, req = Adder(chunk), prompt(60)
    adder.rem_total_tokens = total
    kind = IN_PLACE if promised is None else STREAMED
    promise(adder.admission, req, Admitted(kind, req.prefix_indices.numpy(), 12, promised))
    assert adder.add_chunked(req)[0] == "taken"
    assert adder.seen == [seen]


# a forward pass that is run twice, or given up


class Runtime:
    """Of the runtime, what these hooks call; it notes that."""

    def __init__(self, calls: list[str], looks: bool = False, fails: BaseException | None = None) -> None:
        self.calls, self.fails = calls, fails
        self.step = Step(looks=(0,) if looks else ())

    def choose_resident(self) -> None:
        self.calls.append("choose")

    def before_forward(self, batch: Any, new_pages: Any) -> int:
        self.calls.append(f"before {batch.kind} {new_pages}")
        if self.fails is not None:
            raise self.fails
        return 7

    def after_forward(self, number: int) -> None:
        self.calls.append(f"after {number}")

    def forward_failed(self, error: BaseException) -> None:
        self.calls.append("failed")

    def run_on(self, stream: str) -> None:
        self.calls.append(f"on {stream}")


@pytest.mark.parametrize(
    ("runtime", "extend", "calls"),
    [
        pytest.param(True, True, ["forward", "choose", "forward"], id="a resident prefix"),
        pytest.param(True, False, ["forward"], id="decode"),
        pytest.param(False, True, ["forward"], id="no resident prefix"),
        pytest.param(None, True, ["forward"], id="before the runtime exists"),
    ],
)
def test_a_pass_with_a_first_look_is_run_twice(runtime: bool | None, extend: bool, calls: list[str]) -> None:
    seen: list[str] = []
    runner = SimpleNamespace() if runtime is None else SimpleNamespace(lsa=Runtime(seen, looks=runtime))
    forward_batch = SimpleNamespace(forward_mode=SimpleNamespace(is_extend=lambda: extend))

    def original(self: Any, batch: Any, *args: Any, **kwargs: Any) -> int:
        assert (self, batch, args, kwargs) == (runner, forward_batch, (1,), {"more": 2})
        seen.append("forward")
        return len(seen)

    result = model_runner_forward.forward(original, runner, forward_batch, 1, more=2)
    assert seen == calls
    assert result == len(calls), "the last run's"


@pytest.mark.parametrize(
    ("error", "memory"),
    [
        (torch.OutOfMemoryError("CUDA error"), True),
        (MemoryError(), True),
        (DevicePoolFull("LSA: the device pool"), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate"), True),
        (RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB"), True),
        (RuntimeError("LSA: SGLang allocated 3 pages for a batch that needs 4"), False),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (ValueError("odd"), False),
        (KeyboardInterrupt(), False),
    ],
    ids=repr,
)
def test_out_of_memory(error: BaseException, memory: bool) -> None:
    assert scheduler_run_batch.out_of_memory(error) is memory


def scheduler(runtime: Runtime, overlap: bool = False) -> SimpleNamespace:
    return SimpleNamespace(
        tp_worker=SimpleNamespace(model_runner=SimpleNamespace(lsa=runtime)),
        enable_overlap=overlap,
        device="cuda" if overlap else "cpu",
        forward_stream="stream",
        token_to_kv_pool_allocator=SimpleNamespace(take_new_pages=lambda: "pages"),
    )


BATCH = SimpleNamespace(
    reqs=[],
    seq_lens_cpu=torch.zeros(0, dtype=torch.int64),
    forward_mode=SimpleNamespace(is_extend=lambda: False, is_decode=lambda: True),
)


@pytest.mark.parametrize("overlap", [False, True], ids=["cpu", "gpu"])
def test_pages_are_brought_in_before_a_pass_and_mirrored_after_it(overlap: bool) -> None:
    calls: list[str] = []

    def original(self: Any, batch: Any, *args: Any) -> str:
        assert batch is BATCH
        calls.append(f"run {args}")
        return "result"

    result = scheduler_run_batch.run_batch(original, scheduler(Runtime(calls), overlap), BATCH, 3)
    assert result == "result"
    assert calls == ["on stream"] * overlap + ["before decode pages", "run (3,)", "after 7"]


@pytest.mark.parametrize(
    ("error", "given_up"),
    [
        (RuntimeError("LSA: SGLang allocated 3 pages"), False),
        (ValueError("odd"), False),
        (KeyError("request"), False),
        (DevicePoolFull("LSA: full"), True),
        (MemoryError(), True),
        (torch.OutOfMemoryError("no memory"), True),
    ],
    ids=repr,
)
@pytest.mark.parametrize("where", ["before", "in"])
def test_only_a_lack_of_memory_is_survived(
    where: str, error: Exception, given_up: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then the batch fails, and nothing else; whatever else goes wrong is a bug, and SGLang ends."""
    calls: list[str] = []
    monkeypatch.setattr(scheduler_run_batch, "give_up", lambda *arguments: ("given up", *arguments))

    def original(self: Any, batch: str) -> str:
        raise error

    stand_in = scheduler(Runtime(calls, fails=error if where == "before" else None))
    if given_up:
        result = scheduler_run_batch.run_batch(original, stand_in, BATCH)
        assert result == ("given up", stand_in, BATCH, error)
    else:
        with pytest.raises(type(error)) as raised:
            scheduler_run_batch.run_batch(original, stand_in, BATCH)
        assert raised.value is error
    assert calls == ["before decode pages"] + ["failed"] * given_up


# arguments, without SGLang: also those that SGLang's own checks would refuse first


def arguments(**changed: Any) -> SimpleNamespace:
    text = SimpleNamespace(hidden_size=576, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3)
    model = SimpleNamespace(
        model_path="model",
        is_hybrid_swa=False,
        sliding_window_size=None,
        attention_chunk_size=None,
        attention_arch=SimpleNamespace(name="MHA"),
        head_dim=64,
        v_head_dim=64,
        dtype="torch.bfloat16",
        hf_config=SimpleNamespace(architectures=["LlamaForCausalLM"], get_text_config=lambda: text),
        hf_text_config=text,
        linear_attn_registry_result=None,
        is_generation=True,
        num_hidden_layers=30,
    )
    vars(model).update(changed.pop("model", {}))
    values = {name: fine for name, fine, _ in (*REFUSED_FLAGS, *REFUSED_SINCE_0_5_22)}
    values |= {
        "radix_eviction_policy": "lru",
        "kv_cache_dtype": "auto",
        "device": "cpu",
        "attention_backend": "torch_native",
        "prefill_attention_backend": None,
        "decode_attention_backend": None,
        "get_model_config": lambda: model,
        "_model_config": model,  # where 0.5.23 keeps it
    }
    return SimpleNamespace(**{**values, **changed})


def test_arguments_that_fit() -> None:
    config = LSAConfig(budget=0.25)
    assert attach(arguments(), config).lsa_config is config


@pytest.mark.skipif(RELEASE.resolves_late, reason="refused with this SGLang")
def test_several_http_workers_fit() -> None:
    attach(arguments(tokenizer_worker_num=4), LSAConfig())


@pytest.mark.parametrize(
    ("name", "given", "words"),
    [
        ("api_key", "secret", "--api-key: not supported with --tokenizer-worker-num 2: SGLang checks no keys there"),
        ("admin_api_key", "secret", "--admin-api-key: not supported with --tokenizer-worker-num 2"),
        ("enable_http2", True, "--enable-http2: not supported with --tokenizer-worker-num 2"),
    ],
)
def test_what_several_http_workers_cannot_do_is_refused(name: str, given: Any, words: str) -> None:
    attach(arguments(**{name: given}), LSAConfig())
    with pytest.raises(Unsupported, match=words) as caught:
        attach(arguments(tokenizer_worker_num=2, **{name: given}), LSAConfig())
    assert "secret" not in str(caught.value)


def test_http_workers_serve_our_application() -> None:
    """uvicorn makes it in each of them; an application that is served from this process stays as it is."""
    (app, host), options = uvicorn_run.serve_our_application(uvicorn_run.SGLANG_APP, "here", workers=2)
    assert (host, options) == ("here", {"workers": 2, "factory": True})
    module, function = app.split(":")
    assert callable(getattr(importlib.import_module(module), function))
    assert uvicorn_run.serve_our_application(object(), host="here") is None
    source = inspect.getsource(importlib.import_module("sglang.srt.entrypoints.http_server")._setup_and_run_http_server)
    if HERE == "0.5.17":  # 0.5.23 is refused with several workers
        assert f'"{uvicorn_run.SGLANG_APP}",' in source, "what SGLang tells uvicorn"


# the hook that refuses


class Judge:
    """Admission's verdict, and how often it was asked."""

    def __init__(self, reason: str | None = None, longest: int | None = None):
        self.reason, self.most, self.asked = reason, longest, 0

    def judge(self, arrival: Arrival) -> Verdict:
        self.asked += 1
        return Verdict(self.options(arrival.custom_params), self.reason)

    def options(self, custom_params: Any) -> RequestOptions:
        return RequestOptions.parse(custom_params, LSAConfig())

    def longest(self, options: RequestOptions) -> int | None:
        return self.most


def queued(judge: Judge, **req: Any) -> SimpleNamespace:
    """A request that came to the queue once."""
    values = {"rid": "a", "to_finish": None, "origin_input_ids": [7] * 100, "logprob_start_len": 100, "told": None}
    values["sampling_params"] = SimpleNamespace(custom_params=None, max_new_tokens=10)
    asked = SimpleNamespace(**{**values, **req})
    asked.set_finish_with_abort = lambda reason: vars(asked).update(told=reason)
    scheduler = SimpleNamespace(
        tp_worker=SimpleNamespace(model_runner=SimpleNamespace(lsa=SimpleNamespace(admission=judge)))
    )
    for again in ({}, {"is_retracted": True}):
        scheduler_add_request_to_queue.refuse_impossible(scheduler, asked, **again)
    return asked


@pytest.mark.parametrize("truncate", [False, True])
def test_a_request_is_judged_once(truncate: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    serving = SimpleNamespace(allow_auto_truncate=truncate)
    monkeypatch.setattr("sglang.srt.runtime_context.get_serving", lambda: serving)
    refusing = Judge("it is too long")
    assert queued(refusing).told == "it is too long"
    assert refusing.asked == 1, "what comes back to the queue may stay"
    assert queued(allowing := Judge(longest=60)).told is None
    seen = queued(Judge(longest=60))
    assert (len(seen.origin_input_ids), seen.logprob_start_len) == ((60, 60) if truncate else (100, 100))
    assert len(queued(Judge(longest=None)).origin_input_ids) == 100
    assert allowing.asked == 1
    given_up = Judge("another reason")
    assert queued(given_up, to_finish="SGLang's reason").told is None
    assert given_up.asked == 0


@pytest.mark.parametrize(("name", "fine", "fix"), REFUSED_FLAGS, ids=[name for name, _, _ in REFUSED_FLAGS])
def test_every_listed_flag_is_refused(name: str, fine: Any, fix: str) -> None:
    bad = True if fine is False else fine + 1 if isinstance(fine, int) else "other"
    server_args = arguments(**{name: bad})
    with pytest.raises(Unsupported) as caught:
        attach(server_args, LSAConfig())
    flag = "--" + name.replace("_", "-")
    assert str(caught.value) == f"LSA cannot start:\n  {flag} {bad}: not supported with LSA yet: {fix}"
    assert not hasattr(server_args, "lsa_config")


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"is_hybrid_swa": True}, "model has sliding-window attention: .*use a dense model"),
        ({"attention_arch": SimpleNamespace(name="MLA")}, "model has MLA attention: .*use an MHA/GQA model"),
        ({"is_generation": False}, "model does not generate text: serve it without LSA"),
    ],
)
def test_models_that_cannot_work_are_refused(changed: dict[str, Any], words: str) -> None:
    with pytest.raises(Unsupported, match=words):
        attach(arguments(model=changed), LSAConfig())


SHAPE = {"hidden_size": 576, "num_hidden_layers": 30, "q_heads": 9, "kv_heads": 3, "head_dim": 64}
CHECKPOINT: dict[str, Any] = {"model": SHAPE, "heads": [[9, 3], [15, 0]]}


def write_indexer(folder: pathlib.Path, checkpoint: Any = CHECKPOINT) -> None:
    """An untrained one, with this as its configuration; where that is impossible, weights do not fit it."""
    try:
        config = config_from_json(checkpoint)
    except (ValueError, TypeError, KeyError, AttributeError):
        config = config_from_json(CHECKPOINT)
    MemoryIndexer(config).save(folder)
    (folder / "config.json").write_text(json.dumps(checkpoint))


@pytest.mark.parametrize(
    ("checkpoint", "words"),
    [
        (None, "has no config.json: give a folder written by sglang-lsa train"),
        ("no JSON", "config.json is no indexer configuration"),
        ("no weights", "model.safetensors does not fit config.json"),
        ([1], "config.json is no indexer configuration"),
        ({"model": SHAPE}, "config.json is no indexer configuration"),
        ({"model": {"hidden_size": 576}, "heads": [[9, 3]]}, "config.json is no indexer configuration"),
        ({**CHECKPOINT, "heads": []}, "config.json is no indexer configuration"),
        ({**CHECKPOINT, "heads": [[9, 9]]}, "config.json is no indexer configuration"),
        ({**CHECKPOINT, "model": {**SHAPE, "hidden_size": 4096}}, r"hidden_size=4096, .*; this one is of .*size=576"),
        ({**CHECKPOINT, "model": {**SHAPE, "kv_heads": 9}}, "give the indexer that belongs to this model"),
        (CHECKPOINT, None),
    ],
)
def test_the_indexer_must_belong_to_the_model(checkpoint: Any, words: str | None, tmp_path: pathlib.Path) -> None:
    if checkpoint is not None:
        write_indexer(tmp_path, CHECKPOINT if isinstance(checkpoint, str) else checkpoint)
        if checkpoint == "no JSON":
            (tmp_path / "config.json").write_text("{")
        elif checkpoint == "no weights":
            (tmp_path / "model.safetensors").write_bytes(b"")
    config = LSAConfig(indexer=str(tmp_path))
    if words is None:
        assert attach(arguments(), config).lsa_config.policy == "indexer"
        return
    with pytest.raises(Unsupported, match=words):
        attach(arguments(), config)


def test_auto_needs_an_indexer_that_knows_what_its_sets_cover(tmp_path: pathlib.Path) -> None:
    write_indexer(tmp_path)
    config = LSAConfig(indexer=str(tmp_path), budget="auto")
    with pytest.raises(Unsupported, match="--lsa-budget auto needs an indexer that knows"):
        attach(arguments(), config)
    points = {"points": [[0, 0, 0], [1, 1, 1]], "source": "a test"}
    (tmp_path / "config.json").write_text(json.dumps({**CHECKPOINT, "expectation": points}))
    assert attach(arguments(), config).lsa_config.auto


@pytest.mark.parametrize(
    ("given", "kv_heads", "head_dim"),
    [
        ({"num_key_value_heads": 3, "head_dim": 80}, 3, 80),
        ({"num_key_value_heads": 3, "head_dim": None}, 3, 64),
        ({"num_key_value_heads": None}, 9, 64),
        ({}, 9, 64),
    ],
    ids=["all given", "no head_dim", "no KV heads", "neither"],
)
def test_shape_of_a_model(given: dict[str, Any], kv_heads: int, head_dim: int) -> None:
    """Configurations leave out what is as usual: one KV head a head, and heads that divide the width."""
    text = SimpleNamespace(hidden_size=576, num_hidden_layers=30, num_attention_heads=9, **given)
    assert shape_of(text) == ModelShape(576, 30, 9, kv_heads, head_dim)


def test_layers_are_not_chosen_beside_an_indexer(tmp_path: pathlib.Path) -> None:
    write_indexer(tmp_path)
    with pytest.raises(Unsupported, match=r"--lsa-observe-layers 1,2: the indexer .* leave the flag out"):
        attach(arguments(), LSAConfig(indexer=str(tmp_path), observe_layers=(1, 2)))


@pytest.mark.parametrize("name", ["mxfp8", "nvfp4", "fp4_mx_block16", "int8"])
def test_types_of_kv_that_cannot_work(name: str) -> None:
    fix = "use one of auto, bfloat16, bf16, fp8_e4m3, fp8_e5m2"
    with pytest.raises(Unsupported, match=f"--kv-cache-dtype {name}: not supported with LSA yet: {fix}"):
        attach(arguments(kv_cache_dtype=name), LSAConfig())


@pytest.mark.parametrize("computed", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["fp8_e4m3", "fp8_e5m2"])
def test_kv_in_fp8(name: str, computed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compatibility, "_cuda", lambda: True)
    on_gpu = {"device": "cuda", "attention_backend": "flashinfer"}
    for device in ({}, on_gpu):
        changed = {"kv_cache_dtype": name, "quantization_param_path": None, **device}
        attach(arguments(**changed, model={"dtype": f"torch.{computed}"}), LSAConfig())
    changed = {"kv_cache_dtype": "fp8_e4m3", "quantization_param_path": "s.json"}
    with pytest.raises(Unsupported, match=r"--quantization-param-path s\.json: .*reads it without them; leave it out"):
        attach(arguments(**changed), LSAConfig())


@pytest.mark.parametrize("name", ["bfloat16", "bf16"])
def test_kv_of_another_type_than_the_model_is_refused_on_a_gpu(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans of FlashInfer name one type for both; on a CPU what is read is converted."""
    monkeypatch.setattr(compatibility, "_cuda", lambda: True)
    changed = {"kv_cache_dtype": name, "model": {"dtype": "torch.float16"}}
    assert attach(arguments(**changed), LSAConfig())
    changed |= {"device": "cuda", "attention_backend": "flashinfer", "model": {"dtype": "torch.float16"}}
    with pytest.raises(Unsupported, match=f"--kv-cache-dtype {name}, but the model computes in float16: .*leave the"):
        attach(arguments(**changed), LSAConfig())
    assert attach(arguments(**{**changed, "model": {"dtype": "torch.bfloat16"}}), LSAConfig())


def test_defaults_leave_what_was_given() -> None:
    given = {"device": "cpu", "page_size": 32, "attention_backend": "triton", "chunked_prefill_size": 100}
    values = dict(given)
    apply_defaults(values, LSAConfig())
    assert values.items() >= given.items()
    assert values["radix_cache_backend"] == "lsa"


def test_defaults_of_a_gpu() -> None:
    """What is not listed here stays SGLang's."""
    values: dict[str, Any] = {"device": "cuda", "attention_backend": None}
    apply_defaults(values, LSAConfig())
    assert values == {
        "device": "cuda",
        "attention_backend": "flashinfer",
        "cuda_graph_backend_prefill": "disabled",
        "page_size": 64,
        "radix_cache_backend": "lsa",
        "max_running_requests": 256,
    }


def on_a_gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], flash_attention: bool = True) -> None:
    """As if torch saw one, and SGLang's kernels were built for it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda gpu: capability)
    found: Any = types.ModuleType("sgl_kernel.flash_attn") if flash_attention else None
    monkeypatch.setitem(sys.modules, "sgl_kernel", types.ModuleType("sgl_kernel"))
    monkeypatch.setitem(sys.modules, "sgl_kernel.flash_attn", found)


@pytest.mark.parametrize(
    ("capability", "built", "given", "prefill"),
    [
        pytest.param((9, 0), True, {}, "fa3", id="Hopper"),
        pytest.param((9, 0), False, {}, None, id="Hopper, kernels not built"),
        pytest.param((8, 0), True, {}, None, id="Ampere"),
        pytest.param((10, 0), True, {}, None, id="Blackwell"),
        pytest.param((9, 0), True, {"attention_backend": "flashinfer"}, None, id="one backend asked for"),
        pytest.param((9, 0), True, {"prefill_attention_backend": "flashinfer"}, "flashinfer", id="prefill asked for"),
        pytest.param((9, 0), True, {"decode_attention_backend": "fa3"}, "fa3", id="decode asked for"),
        pytest.param((9, 0), True, {"kv_cache_dtype": "fp8_e5m2"}, None, id="KV that it cannot read"),
        pytest.param((9, 0), True, {"kv_cache_dtype": "fp8_e4m3"}, "fa3", id="KV in FP8"),
    ],
)
def test_prompts_are_read_by_the_fastest_kernels_that_are_there(
    capability: tuple[int, int],
    built: bool,
    given: dict[str, Any],
    prefill: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    on_a_gpu(monkeypatch, capability, built)
    values: dict[str, Any] = {"device": "cuda", **given}
    apply_defaults(values, LSAConfig())
    assert values.get("prefill_attention_backend") == prefill
    assert values["attention_backend"] == "flashinfer"
    assert values.get("decode_attention_backend") == given.get("decode_attention_backend")


@pytest.mark.parametrize(
    ("capability", "built", "changed", "words"),
    [
        ((8, 9), True, {}, "FlashAttention-3 is for GPUs of compute capability 9.x (Hopper), this one has 8.9"),
        ((9, 0), False, {}, "sgl_kernel has no FlashAttention-3 here"),
        ((9, 0), True, {"kv_cache_dtype": "fp8_e5m2"}, "FlashAttention-3 reads fp8_e4m3 only, not --kv-cache-dtype"),
    ],
)
def test_flash_attention_where_it_cannot_be_is_refused(
    capability: tuple[int, int], built: bool, changed: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_a_gpu(monkeypatch, capability, built)
    (problem,) = device_problems(arguments(**(GPU | {"attention_backend": "fa3"} | changed)), LSAConfig())
    assert problem.startswith(f"--attention-backend fa3: {words}")
    assert problem.endswith(": use flashinfer")


def test_the_gpu_that_is_looked_at_is_the_one_that_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    on_a_gpu(monkeypatch, (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda gpu: ((8, 0), (9, 0))[gpu])
    assert flash_attention_problem({"base_gpu_id": 1}) is None
    assert "has 8.0" in str(flash_attention_problem({"base_gpu_id": 0}))
    assert "has 8.0" in str(flash_attention_problem({}))


def test_kv_that_flash_attention_cannot_read_is_refused_before_another_backend_is_taken() -> None:
    """SGLang changes the flag to Triton's kernels before anybody can see what the user asked for."""
    values: dict[str, Any] = {"device": "cuda", "attention_backend": "fa3", "kv_cache_dtype": "fp8_e5m2"}
    with pytest.raises(
        Unsupported, match=r"--attention-backend fa3: FlashAttention-3 reads fp8_e4m3 only, .*use flash"
    ):
        apply_defaults(values, LSAConfig())


def test_flash_attention_where_it_can_be_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    on_a_gpu(monkeypatch, (9, 0))
    assert device_problems(arguments(**(GPU | {"attention_backend": "fa3"})), LSAConfig()) == []


@pytest.mark.parametrize(
    ("changed", "flag"),
    [
        ({"attention_backend": "fa3"}, "attention-backend"),
        ({"attention_backend": "flashinfer", "decode_attention_backend": "fa3"}, "decode-attention-backend"),
        ({"attention_backend": "flashinfer", "prefill_attention_backend": "fa3"}, None),
        ({"attention_backend": "fa3", "decode_attention_backend": "flashinfer"}, None),
    ],
)
def test_groups_need_flashinfer_in_decode(
    changed: dict[str, str], flag: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_a_gpu(monkeypatch, (9, 0))
    seen = device_problems(arguments(**(GPU | changed)), LSAConfig(groups=True))
    expected = f"--{flag} fa3: not supported with groups yet: use flashinfer"
    assert seen == ([] if flag is None else [expected])
    assert device_problems(arguments(**(GPU | changed)), LSAConfig()) == []


DECODES_ON: dict[str, tuple[dict[str, Any], bool]] = {
    "flashinfer": ({"device": "cuda", "attention_backend": "flashinfer"}, True),
    "flashinfer, prompts on fa3": (
        {"device": "cuda", "attention_backend": "flashinfer", "prefill_attention_backend": "fa3"},
        True,
    ),
    "fa3": ({"device": "cuda", "attention_backend": "fa3"}, False),
    "fa3 in decode only": (
        {"device": "cuda", "attention_backend": "flashinfer", "decode_attention_backend": "fa3"},
        False,
    ),
    "flashinfer in decode only": (
        {"device": "cuda", "attention_backend": "fa3", "decode_attention_backend": "flashinfer"},
        True,
    ),
    "not known": ({"device": "cuda", "attention_backend": None}, False),
    "cpu": ({"device": "cpu", "attention_backend": "torch_native"}, False),
}


@pytest.mark.parametrize(("seen", "fits"), DECODES_ON.values(), ids=DECODES_ON)
@pytest.mark.parametrize("margin", [0.0, 0.2])
def test_groups_are_on_where_they_pay(seen: dict[str, Any], fits: bool, margin: float) -> None:
    given, asked = arguments(**seen), LSAConfig(groups=AUTO, group_margin=margin, calibrate="cached")
    found = with_groups(asked, given, dense=True)
    assert (found.groups, found.group_margin) == (fits, margin if fits else 0.0)
    assert found.calibrates and found == dataclasses.replace(asked, groups=fits, group_margin=found.group_margin)
    assert with_groups(asked, given, dense=False).groups is False, "DeepSeek-V4"
    for said in (LSAConfig(), LSAConfig(groups=True)):
        assert with_groups(said, given, dense=True) is said


def test_servers_know_whether_they_have_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Auto is decided when arguments are checked, so that every process hears the same; it is never refused."""
    on_a_gpu(monkeypatch, (9, 0))
    for changed, fits in (({}, False), (GPU, True), (GPU | {"decode_attention_backend": "fa3"}, False)):
        given = attach(arguments(**changed), LSAConfig(groups=AUTO))
        assert pickle.loads(pickle.dumps(given.lsa_config)).groups is fits
    with pytest.raises(Unsupported, match="fa3: not supported with groups yet"):
        attach(arguments(**(GPU | {"decode_attention_backend": "fa3"})), LSAConfig(groups=True))
    assert attach(arguments(), LSAConfig(groups=True)).lsa_config.groups is True, "a CPU can, and shows it"


def test_defaults_of_a_gpu_leave_what_was_given() -> None:
    given = {"device": "cuda", "attention_backend": "triton", "cuda_graph_backend_prefill": "full"}
    values: dict[str, Any] = dict(given)
    apply_defaults(values, LSAConfig())
    assert values.items() >= given.items()
    values = {"device": "cuda", "cuda_graph_config": {"prefill": {"backend": "full"}}}
    apply_defaults(values, LSAConfig())
    assert "cuda_graph_backend_prefill" not in values


# devices, attention backends and CUDA graphs


def graphs(prefill: str = "disabled", decode: str = "full") -> SimpleNamespace:
    return SimpleNamespace(prefill=SimpleNamespace(backend=prefill), decode=SimpleNamespace(backend=decode))


GPU: dict[str, Any] = {"device": "cuda", "attention_backend": "flashinfer", "cuda_graph_config": graphs()}


@pytest.mark.parametrize(
    "changed",
    [
        pytest.param({}, id="cpu"),
        pytest.param({"attention_backend": None}, id="cpu, backend not chosen yet"),
        pytest.param({"cuda_graph_config": graphs(prefill="full")}, id="cpu, graphs do not matter"),
        pytest.param(GPU, id="cuda"),
        pytest.param(GPU | {"decode_attention_backend": "flashinfer"}, id="cuda, backend of decode"),
        pytest.param(GPU | {"cuda_graph_config": graphs(decode="disabled")}, id="cuda, no graphs"),
        pytest.param(GPU | {"cuda_graph_config": None}, id="cuda, graphs not chosen yet"),
    ],
)
def test_devices_that_work(changed: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compatibility, "_cuda", lambda: True)
    assert device_problems(arguments(**changed), LSAConfig()) == []
    assert hasattr(attach(arguments(**changed), LSAConfig()), "lsa_config")


@pytest.mark.parametrize(
    ("changed", "cuda", "words"),
    [
        ({"device": "xpu"}, True, "--device xpu: not supported with LSA yet: use cpu or cuda"),
        (GPU, False, "--device cuda: torch sees no NVIDIA GPU here: use --device cpu"),
        (
            GPU | {"attention_backend": "torch_native"},
            True,
            "--attention-backend torch_native: not supported with LSA on this device (cuda): "
            "use flashinfer or fa3, or leave it out",
        ),
        (
            GPU | {"prefill_attention_backend": "trtllm_mha"},
            True,
            "--prefill-attention-backend trtllm_mha: not supported with LSA on this device (cuda): "
            "use flashinfer or fa3, or leave it out",
        ),
        (
            GPU | {"decode_attention_backend": "fa3"},
            True,
            "--decode-attention-backend fa3: torch sees no NVIDIA GPU here: use flashinfer",
        ),
        (
            {"attention_backend": "fa3"},
            True,
            "--attention-backend fa3: not supported with LSA on this device (cpu): use torch_native, or leave it out",
        ),
        (
            {"decode_attention_backend": "flashinfer"},
            True,
            "--decode-attention-backend flashinfer: not supported with LSA on this device (cpu): "
            "use torch_native, or leave it out",
        ),
        (
            GPU | {"cuda_graph_config": graphs(prefill="full")},
            True,
            "--cuda-graph-backend-prefill full: not supported with LSA yet: use disabled",
        ),
        (
            GPU | {"cuda_graph_config": graphs(decode="breakable")},
            True,
            "--cuda-graph-backend-decode breakable: not supported with LSA yet: use full",
        ),
    ],
)
def test_devices_that_cannot_work_are_refused(
    changed: dict[str, Any], cuda: bool, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compatibility, "_cuda", lambda: cuda)
    server_args = arguments(**changed)
    assert device_problems(server_args, LSAConfig()) == [words]
    with pytest.raises(Unsupported) as caught:
        attach(server_args, LSAConfig())
    assert str(caught.value) == f"LSA cannot start:\n  {words}"
    assert not hasattr(server_args, "lsa_config")


def test_a_recording_server_runs_without_decode_graphs(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    monkeypatch.setattr(compatibility, "_cuda", lambda: True)
    config = LSAConfig(record=str(tmp_path / "new"))
    given: dict[str, Any] = {}
    apply_defaults(given, config)
    assert given["cuda_graph_backend_decode"] == "disabled"
    words = "--cuda-graph-backend-decode full: not supported with --lsa-record: use disabled"
    assert device_problems(arguments(**GPU), config) == [words]
    fine = arguments(**GPU | {"cuda_graph_config": graphs(decode="disabled")})
    assert attach(fine, config).lsa_config is config
    assert (tmp_path / "new").is_dir()


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: pathlib.Path) -> None:
    (tmp_path / "file").write_text("")
    config = LSAConfig(record=str(tmp_path / "file"))
    with pytest.raises(Unsupported, match=r"--lsa-record .*file: cannot be written \(File exists\): give a folder"):
        attach(arguments(), config)


def test_giving_up_releases_kv_as_this_sglang_does_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """It happens when memory has run out alone: a parameter of another name would be found by a user."""
    from sglang.srt.disaggregation import utils
    from sglang.srt.mem_cache import common

    release = mock.create_autospec(common.release_kv_cache)
    monkeypatch.setattr(common, "release_kv_cache", release)
    monkeypatch.setattr(utils, "prepare_abort", lambda req, message, status: setattr(req, "message", message))
    sent: list[Any] = []
    req = SimpleNamespace(rid="a", finished=lambda: False, is_retracted=False)
    req.finished_reason = SimpleNamespace(to_json=lambda: {"type": "abort"})
    pager = SimpleNamespace(make_equal=lambda: None)
    scheduler = SimpleNamespace(
        tree_cache="tree",
        chunked_req=req,
        forward_ct=7,
        tp_worker=SimpleNamespace(model_runner=SimpleNamespace(lsa=SimpleNamespace(pager=pager))),
        ipc_channels=SimpleNamespace(
            send_to_tokenizer=SimpleNamespace(send_output=lambda output, of: sent.append(output.rid))
        ),
    )
    batch = SimpleNamespace(reqs=[req], launch_ts=None)
    scheduler_run_batch.give_up(scheduler, batch, MemoryError("no more"))
    kept_out = {"checkpoint" if RELEASE.checkpoints else "is_insert": False}
    release.assert_called_once_with(req, "tree", **kept_out)
    assert (sent, scheduler.chunked_req) == (["a"], None)
    assert "no more" in req.message


@pytest.mark.parametrize("prefills", [True, False], ids=["prefill", "decode"])
def test_sglang_counts_a_batch_that_was_given_up(prefills: bool) -> None:
    """Memory may run out before SGLang has said of a batch when it was launched, and behind which pass."""
    from sglang.srt.managers.scheduler import Scheduler

    mode = SimpleNamespace(
        is_extend_without_speculative=lambda: prefills,
        is_split_prefill=lambda: False,
        is_decode=lambda: not prefills,
        is_target_verify=lambda: False,
    )
    batch = SimpleNamespace(reqs=[], forward_mode=mode, extend_num_tokens=5, after_idle_gap=False)
    batch.launch_ts = batch.forward_iter = None
    scheduler = mock.MagicMock(forward_ct=7, total_prefill_busy_us=0, total_prefill_uncached_tokens=0)
    before = time.monotonic()
    scheduler._prev_step, scheduler._prev_decode_launch_ts = (7, before, prefills), before
    scheduler._prev_prefill_end_ts, scheduler._pause_started_at, scheduler._pause_intervals = before, None, deque()
    result = scheduler_run_batch.give_up(scheduler, batch, MemoryError("no more"))
    batch.reqs = [SimpleNamespace(rid="a")]
    Scheduler._record_step_counters(scheduler, batch, result)
    batch.forward_iter, batch.launch_ts = 8, time.monotonic()  # the next one, which is told apart from it
    Scheduler._record_step_counters(scheduler, batch, result)
    assert 0 <= scheduler.total_prefill_busy_us < 60e6


if __name__ == "__main__":
    result = {"stock": stock_probe, "flags": flags_probe}[sys.argv[1]]
    target = pathlib.Path(sys.argv[2])
    target.write_text(json.dumps(result()))
