"""What two real SGLang processes say of the plugin: ``python plugin_probes.py stock|flags FILE``.

Importing SGLang takes most of the time, so each collects what many tests look at."""

from __future__ import annotations

import dataclasses
import inspect
import json
import logging
import multiprocessing
import os
import pathlib
import runpy
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

from release import HERE, HOOKS, in_force, prepared

from sglang_lsa.patches.table import INTAKE, SERVING

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


if __name__ == "__main__":
    result = {"stock": stock_probe, "flags": flags_probe}[sys.argv[1]]
    target = pathlib.Path(sys.argv[2])
    target.write_text(json.dumps(result()))
