"""SGLang's arguments as they are in force, whenever the release resolves them, and our configuration on them.

Until 0.5.18 arguments are resolved while they are made, and the record holds the result. Since then it holds what was
given, and ``ServerArgs.resolve_once``, which every entry point calls, decides the rest beside it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sglang_lsa.config import LSAConfig
from sglang_lsa.patches.releases import IncompatibleSGLang, installed, refusal

CHECKED = "lsa_checked"
Attach = Callable[[Any, LSAConfig], Any]
"""Checks arguments, see :func:`sglang_lsa.patches.compatibility.attach`."""


class Resolved:
    """What a record of given arguments was resolved to, with the methods that records of 0.5.17 have."""

    def __init__(self, server_args: Any):
        from sglang.srt.arg_groups import model_override_base as sglang

        self._sglang, self._given, self._view = sglang, server_args, sglang.resolving_view(server_args)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._view, name)

    def get_model_config(self) -> Any:
        return self._sglang.model_config_of(self._given)

    def get_attention_backends(self) -> tuple[str, str]:
        return self._sglang.attention_backends_of(self._view)

    def use_mla_backend(self) -> bool:
        return self._sglang.use_mla_backend(self._given)

    def _get_default_attn_backend(self, mla: bool, model: Any) -> str:
        return self._sglang.get_default_attn_backend(self._given, mla, model)


def resolved(server_args: Any) -> Any:
    """These arguments as they are in force; to be read only."""
    return Resolved(server_args) if installed().resolves_late and not isinstance(server_args, Resolved) else server_args


def remember(server_args: Any, name: str, value: Any) -> None:
    """Put something of ours on the arguments, which are read-only once resolved. It goes with them to other
    processes."""
    vars(server_args)[name] = value


def take_in(server_args: Any, config: LSAConfig, attach: Attach) -> Any:
    """Put ``config`` on arguments that SGLang has just made; checked now, or when they are resolved.

    Raises:
        Unsupported: see :func:`sglang_lsa.patches.compatibility.attach`.
    """
    remember(server_args, "lsa_config", config)
    if not installed().resolves_late:
        check_once(server_args, attach)
    return server_args


def check_once(server_args: Any, attach: Attach) -> None:
    """Check resolved arguments that have a configuration of ours, the first time.

    Raises:
        Unsupported: see :func:`sglang_lsa.patches.compatibility.attach`.
    """
    config = vars(server_args).get("lsa_config")
    if config is not None and CHECKED not in vars(server_args):
        attach(server_args, config)
        remember(server_args, CHECKED, True)


def proof_of_life(server_args: Any) -> Any:
    """These arguments, which were asked for with LSA, if they have gone through the hooks of the intake.

    A hook can be installed on what SGLang does not call any more: a class that is a Struct never calls ``__init__``.

    Raises:
        IncompatibleSGLang: they have not.
    """
    if vars(server_args).get("lsa_config") is None:
        seen = "was never called through its hook: the --lsa flags did not arrive"
        raise IncompatibleSGLang(refusal("sglang.srt.server_args.ServerArgs.from_cli_args", seen, _version()))
    if CHECKED not in vars(server_args):
        seen = "was never called through its hook: these arguments were not checked"
        raise IncompatibleSGLang(refusal("sglang.srt.server_args.ServerArgs.resolve_once", seen, _version()))
    return server_args


def _version() -> str:
    import sglang

    return str(sglang.__version__)
