"""The scheduler process's answer to the HTTP process: a snapshot as JSON text."""

from __future__ import annotations

import json
import logging
from typing import TYPE_CHECKING, Any

from sglang_lsa.serve.view.snapshot import snapshot
from sglang_lsa.serve.view.tree import TreePicture

if TYPE_CHECKING:
    from sglang_lsa.engine.runtime import LSARuntime

logger = logging.getLogger(__name__)

VIEW = "lsa-view"
"""Id of the internal-state request that is answered with a snapshot, and the key of the answer."""

_picture = TreePicture()


def snapshot_text(runtime: LSARuntime, tree: Any) -> str:
    """The snapshot with the radix tree as JSON, or ``{"error": ...}``.

    Text already, so that the HTTP process, which serves every request, passes it on without reading it. A snapshot that
    fails must not take the scheduler with it.
    """
    try:
        drawn = _picture.take(tree, runtime.pager.ledger, runtime.pager.page)
        return json.dumps({**snapshot(runtime), "tree": drawn})
    except Exception as error:
        logger.exception("LSA: the snapshot for the live view failed; the page shows the error")
        return json.dumps({"error": f"the scheduler could not describe itself: {error!r}"})
