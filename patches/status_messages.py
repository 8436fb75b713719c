"""The two messages by which the HTTP process asks a scheduler what it knows, and is told.

Messages of their own, not SGLang's ``GetInternalStateReq``: its answer has every server argument, copied and made plain
in the scheduler, which is dear, and it cannot say which request is meant. See ``config_messages`` for how SGLang passes
messages of plugins on.

Imports SGLang: import it where SGLang is running already.
"""

from __future__ import annotations

from typing import Any

from sglang.srt.managers.io_struct import BaseReq, hook_custom_types


class LSAStatusReq(BaseReq, kw_only=True):  # type: ignore[call-arg]  # mypy does not look into SGLang
    """Tell the counters, or of requests: of those with the id ``named``, or without it a few numbers of all."""

    requests: bool = False
    named: str | None = None


class LSAStatusReqOutput(BaseReq, kw_only=True):  # type: ignore[call-arg]
    """Plain values and bytes, or why there are none."""

    told: dict[str, Any]
    problem: str | None = None


hook_custom_types(LSAStatusReq, LSAStatusReqOutput)
