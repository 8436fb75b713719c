"""What the servers of ``sglang-lsa bench dsv4`` have beside: an SGLang plugin, in those with LSA and in those without.

Nobody else has it: the benchmark installs it for the servers that it starts. They talk through a folder, named by an
environment variable: a file with what is asked, which an idle server takes away, and a file with its answer.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

FOLDER = "SGLANG_LSA_BENCH"
"""Environment variable: the folder."""
SETUP, ASKED, ANSWER = "setup.json", "asked.json", "answer.json"
GOLDEN = 0.6180339887498949
logger = logging.getLogger(__name__)


def install(folder: pathlib.Path, kv_bytes: int) -> dict[str, str]:
    """Make this module a plugin of the servers that are started with the returned environment.

    Args:
        folder: for nothing else; one server at a time.
        kv_bytes: device bytes that each has for KV of every kind.
    """
    metadata = folder / "sglang_lsa_bench_dsv4-1.0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: sglang_lsa_bench_dsv4\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(f"[sglang.srt.plugins]\nsglang_lsa_bench_dsv4 = {__name__}:register\n")
    (folder / SETUP).write_text(json.dumps({"kv_bytes": kv_bytes}))
    paths = (str(folder), os.environ.get("PYTHONPATH", ""))
    return {"PYTHONPATH": os.pathsep.join(filter(None, paths)), FOLDER: str(folder)}


def ask(folder: pathlib.Path, asked: Mapping[str, Any], alive: Callable[[], bool], seconds: float = 180) -> Any:
    """What the server makes of it, once it is idle.

    Raises:
        RuntimeError: it cannot, it is not alive, or it takes longer.
    """
    answer, part = folder / ANSWER, folder / "part.json"
    part.write_text(json.dumps(asked))
    os.replace(part, folder / ASKED)
    deadline = time.monotonic() + seconds
    while not answer.exists():
        if not alive() or time.monotonic() > deadline:
            raise RuntimeError(f"the server did not answer {dict(asked)} within {seconds:.0f} s: see its log")
        time.sleep(0.05)
    found = json.loads(answer.read_text())
    answer.unlink()
    if "error" in found:
        raise RuntimeError(f"the server could not do {dict(asked)}: {found['error']}")
    return found


# -- inside of a server ------------------------------------------------------------------------------------------------


class Churn:
    """How much of a resident set every window replaces.

    Attributes:
        share: of the set, in [0, 1]; None leaves the choice to the policy.
    """

    share: float | None = None


CHURN = Churn()


def register() -> None:
    """Called by SGLang in every process that loads plugins."""
    from sglang.srt.model_loader import loader
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    from sglang_lsa.engine.policies.native import Native

    folder = pathlib.Path(os.environ[FOLDER])
    setup = json.loads((folder / SETUP).read_text())
    configurator = "sglang.srt.mem_cache.kv_cache_configurator.KVCacheConfigurator.config_from_budget"
    HookRegistry.register(configurator, budget_of(setup["kv_bytes"]), HookType.AROUND)
    idle = "sglang.srt.managers.scheduler.Scheduler.on_idle"
    HookRegistry.register(idle, Desk(folder).look, HookType.BEFORE)
    loader.initialize_dummy_weights = drawn_by(loader.initialize_dummy_weights)
    Native.score = churned(Native.score)  # type: ignore[method-assign]


def budget_of(kv_bytes: int) -> Callable[..., Any]:
    """The same bytes for every system, whatever else is on the device."""

    def config_from_budget(original: Any, self: Any, budget_bytes: int, **options: Any) -> Any:
        if kv_bytes > budget_bytes:
            raise ValueError(
                f"{kv_bytes / 1e9:g} GB are asked for KV, {budget_bytes / 1e9:.1f} GB are left beside the model: "
                "give less with --kv-gb"
            )
        return original(self, kv_bytes, **options)

    return config_from_budget


def drawn_by(stock: Callable[..., None]) -> Callable[..., None]:
    """SGLang's weights for tests are all alike; with these, tokens go to different experts, as they do in a model."""

    def draw(model: Any, *given: Any, **options: Any) -> None:
        stock(model, *given, **options)
        for name, weight in model.state_dict().items():
            if not torch.is_floating_point(weight) or weight.element_size() == 1:
                continue
            if weight.ndim >= 2 and "scale" not in name:
                weight.data.normal_(0, weight.shape[-1] ** -0.5)
            elif "norm" in name:
                weight.data.fill_(1.0)

    return draw


def churned(score: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Scores that cost what the policy's cost, and change as much as :data:`CHURN` says.

    Pages lie on a circle, evenly and in a drawn order. A set is an arc of it, which every window moves on by a share of
    its length.
    """

    @functools.wraps(score)
    def scored(self: Any, request: Any, pages: Any) -> torch.Tensor:
        own = score(self, request, pages)
        if CHURN.share is None:
            return own
        places = (
            torch.arange(len(own), device=own.device, dtype=torch.float64) * GOLDEN + (request.asked.seed % 997) / 997
        )
        begun = (request.window + 1) * CHURN.share * request.asked.budget
        return 1 - ((places - begun) % 1).to(own.dtype)

    return scored


class Desk:
    """Takes what is asked when the server is idle."""

    def __init__(self, folder: pathlib.Path):
        self.asked, self.answer, self.part = folder / ASKED, folder / ANSWER, folder / "answer.part"
        self.forge: Any = None

    def look(self, scheduler: Any) -> None:
        """Before SGLang's idle housekeeping."""
        if not self.asked.exists() or not scheduler.is_fully_idle():
            return
        asked = json.loads(self.asked.read_text())
        self.asked.unlink()
        try:
            found = self.do(scheduler, asked)
        except Exception as error:
            logger.exception("bench dsv4: %s failed", asked)
            found = {"error": f"{type(error).__name__}: {error}"}
        self.part.write_text(json.dumps(found))
        os.replace(self.part, self.answer)

    def do(self, scheduler: Any, asked: Mapping[str, Any]) -> dict[str, Any]:
        """``churn``, or ``forge``: how many prefixes of an arm, and what is left free; says what pools weigh."""
        from sglang_lsa.bench.dsv4_arms import Dsv4Arm
        from sglang_lsa.bench.dsv4_forge import Forge, pool_bytes

        if "churn" in asked:
            CHURN.share = asked["churn"]
            return {"churn": CHURN.share}
        began, allocator = time.perf_counter(), scheduler.token_to_kv_pool_allocator
        pool = allocator.get_kvcache()
        if self.forge is None:
            runtime = getattr(scheduler.tp_worker.model_runner, "lsa", None)
            self.forge = Forge(allocator, scheduler.tree_cache, pool, runtime)
        arm = Dsv4Arm("asked", asked["context"])
        forged = self.forge.prefixes(arm, asked["most"], asked["vocabulary"], asked["spare"])
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds = time.perf_counter() - began
        return {"forged": forged, "seconds": seconds, "pools": dict(pool_bytes(pool))}
