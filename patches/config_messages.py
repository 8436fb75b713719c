"""The two messages by which a change of the configuration goes from the HTTP process to the schedulers and back.

Messages of their own, not SGLang's ``SetInternalStateReq``: that one carries numbers only (no policy, no null), answers
with a bool instead of a reason, and anybody who may call ``/set_internal_state`` could send it past the checks of
``POST /lsa/config``. ``hook_custom_types`` is how SGLang lets further types through its decoder. Like every control
message, SGLang hands it to all tensor-parallel ranks of a scheduler between two batches, in the order of arrival, and
to every data-parallel one; each answers once.

Imports SGLang: import it where SGLang is running already.
"""

from __future__ import annotations

from typing import Any

from sglang.srt.managers.io_struct import BaseReq, hook_custom_types


class LSAConfigReq(BaseReq, kw_only=True):  # type: ignore[call-arg]  # mypy does not look into SGLang
    """Change these fields, all or none."""

    values: dict[str, int | float | str | None]


class LSAConfigReqOutput(BaseReq, kw_only=True):  # type: ignore[call-arg]
    """The configuration in force afterwards, or why nothing was changed."""

    in_force: dict[str, Any]
    problem: str | None = None


hook_custom_types(LSAConfigReq, LSAConfigReqOutput)
