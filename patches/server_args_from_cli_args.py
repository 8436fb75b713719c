"""The ``--lsa-*`` flags become ``server_args.lsa_config``; defaults that LSA needs are set before SGLang resolves."""

from __future__ import annotations

from sglang_lsa.config import config_from_args
from sglang_lsa.patches.compatibility import apply_defaults, attach
from sglang_lsa.patches.hook import Hook
from sglang_lsa.patches.resolved import take_in


def from_cli_args(original, cls, args):
    config = config_from_args(args)
    if config is None:
        return original(cls, args)
    apply_defaults(vars(args), config)
    return take_in(original(cls, args), config, attach)


HOOK = Hook(
    target="sglang.srt.server_args.ServerArgs.from_cli_args",
    kind="around",
    function=from_cli_args,
    parameters=("args",),
    why="ServerArgs is a dataclass: it drops flags that are not its fields.",
    until="SGLang keeps plugin flags on ServerArgs.",
    test="tests/unit/test_plugin.py::test_flags_reach_server_args",
    relies_on=(
        "sglang.srt.server_args.prepare_server_args",
        "sglang.srt.server_args.ServerArgs.__post_init__",
        "sglang.srt.server_args.ServerArgs.get_model_config",
    ),
)
