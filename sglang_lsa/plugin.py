"""Entry point of the SGLang plugin: installs the hooks in processes that serve with LSA, and nothing in others."""

from __future__ import annotations

import sys

from sglang_lsa.config import arrived_by_pickle

_installed = False


def register() -> None:
    """Called by SGLang in every process that loads plugins, before it reads its arguments.

    SGLang logs and ignores plugins that fail, and would then serve without LSA; an exit is what it cannot ignore.
    """
    if _needs_nothing():
        return
    from sglang_lsa.patches import engine_server_args_class
    from sglang_lsa.patches.releases import IncompatibleSGLang
    from sglang_lsa.patches.table import INTAKE
    from sglang_lsa.patches.table import install as install_hooks

    if arrived_by_pickle or _asked_for(sys.argv):
        try:
            install()
        except IncompatibleSGLang as error:
            raise SystemExit(f"sglang-lsa: {error}") from error
    elif _is_a_library():
        engine_server_args_class.before_lsa = install
        install_hooks(INTAKE)  # if it fails, SGLang logs that; this program did not ask for LSA


def install() -> None:
    """Install everything that serving with LSA needs in this process; a second call does nothing.

    Raises:
        IncompatibleSGLang: see :func:`sglang_lsa.patches.table.install`.
    """
    global _installed
    if _installed:
        return
    from sglang.srt.layers.attention.attention_registry import register_attention_backend
    from sglang.srt.mem_cache.registry import register_radix_cache_backend

    from sglang_lsa.patches.compatibility import RADIX_CACHE_BACKEND
    from sglang_lsa.patches.table import INTAKE, SERVING
    from sglang_lsa.patches.table import install as install_hooks
    from sglang_lsa.stock_server import let_sglang_run_on_this_cpu

    let_sglang_run_on_this_cpu()
    install_hooks((*INTAKE, *SERVING))
    for name, backend in _ATTENTION.items():
        register_attention_backend(name)(backend)
    register_radix_cache_backend(RADIX_CACHE_BACKEND, _radix_cache)
    if not arrived_by_pickle:  # the process that serves HTTP
        from sglang_lsa.patches.http_routes import add_routes

        add_routes()
    _installed = True


def _torch_native(model_runner):
    from sglang_lsa.attend.torch_native import LSATorchBackend

    return LSATorchBackend(model_runner)


def _flashinfer(model_runner):
    from sglang_lsa.attend.flashinfer import LSAFlashInferBackend

    return LSAFlashInferBackend(model_runner, init_new_workspace=model_runner.init_new_workspace)


def _flash_attention(model_runner):
    from sglang_lsa.attend.flash_attention import LSAFlashAttentionBackend

    return LSAFlashAttentionBackend(model_runner)


def _dsv4(model_runner):
    from sglang_lsa.attend.dsv4 import LsaDeepseekV4Backend

    return LsaDeepseekV4Backend(model_runner)


_ATTENTION = {"torch_native": _torch_native, "flashinfer": _flashinfer, "fa3": _flash_attention, "dsv4": _dsv4}
"""Makes the backends that LSA extends; users name them as they do without LSA."""


def _radix_cache(context):
    from sglang_lsa.radix_ext.radix_cache import build_tree_cache

    return build_tree_cache(context.params, context.tp_worker.model_runner.lsa)


def _needs_nothing() -> bool:
    """Whether this is a process of SGLang that has nothing of ours to do, though it loads plugins since 0.5.22; by then
    it has its title."""
    from setproctitle import getproctitle

    return getproctitle().startswith(("sglang::detokenizer", "sglang::data_parallel_controller"))


def _asked_for(argv: list[str]) -> bool:
    return any(argument.startswith("--lsa-") for argument in argv)


def _is_a_library() -> bool:
    """Whether this process is neither SGLang's server command nor one of its children, so it may build an Engine."""
    main = getattr(sys.modules.get("__main__"), "__spec__", None)
    command = (main.name if main else "") + " " + " ".join(sys.argv[:1])
    servers = ("sglang.launch_server", "sglang.cli", "sglang_lsa.stock_server")
    server = any(name in command for name in servers) or command.endswith("/sglang")
    child = sys.modules["__main__"].__name__ == "__mp_main__"
    return not (server or child) or "--help" in sys.argv or "-h" in sys.argv
