"""The server that these flags would start: its arguments as SGLang resolves them, and its memory plan. Loads nothing.

Arguments go through the server's own code with the hooks installed in this process, and the plan is made by
:mod:`sglang_lsa.engine.sizing`, which the server calls when its model is loaded. What the server measures then is
estimated here: the device memory that is free before the weights are loaded, and the weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

from sglang_lsa.config import LSAConfig
from sglang_lsa.doctor.contexts import Fit, fit
from sglang_lsa.doctor.machine import Gpu
from sglang_lsa.doctor.weights import ASSUMED, MEASURED, Weights, shared, weights_of
from sglang_lsa.engine import sizing
from sglang_lsa.engine.sizing import MemoryPlan, plan_memory
from sglang_lsa.indexer.checkpoint import read_checkpoint_config
from sglang_lsa.indexer.expectation import Expectation
from sglang_lsa.launch_server import server_arguments, with_defaults
from sglang_lsa.memory import mirror as host_mirror
from sglang_lsa.memory.mirror import GB
from sglang_lsa.patches import arguments
from sglang_lsa.patches.resolved import resolved

CUDA_CONTEXT_BYTES = GB // 2
"""Assumed to be gone from a GPU before weights are loaded."""


@dataclass(frozen=True)
class DeviceMemory:
    """Memory of the device on which the server would run, in bytes; on a CPU that is the host's.

    Attributes:
        total_bytes: of the device.
        free_bytes: before the weights are loaded.
        how: ``measured`` here, or ``assumed`` from ``--gpu-memory-gb``.
    """

    total_bytes: int
    free_bytes: int
    how: str


@dataclass(frozen=True)
class HostMemory:
    """Free memory of the host in bytes, ``measured`` here or ``assumed`` from ``--free-host-memory-gb``."""

    free_bytes: int
    how: str


@dataclass(frozen=True)
class Server:
    """A server that was not started; sizes are the server's own, from estimates of what it will measure.

    Attributes:
        name: the model as given.
        config: of LSA.
        context_tokens: longest context of the model; ``table_tokens`` is what SGLang's table has room for.
        host: free memory of the host, which the mirror is made of.
        static_share: SGLang's ``--mem-fraction-static``, given or chosen by SGLang.
        budgeted_bytes: of the device, for KV and for LSA's buffers.
        budgeted_tokens: that pages in these bytes hold; ``stock_tokens`` is what SGLang would take there without LSA.
        chunk_tokens: of prefill; None when prompts are not cut.
        max_requests: that run at the same time.
        dtype: of KV.
        ranks: that share the model (``--tp-size``), all on this host; everything else is of one of them, but ``host``.
    """

    name: str
    device: str
    config: LSAConfig
    memory: DeviceMemory
    host: HostMemory
    weights: Weights
    static_share: float
    budgeted_bytes: int
    budgeted_tokens: int
    plan: MemoryPlan
    context_tokens: int
    table_tokens: int
    chunk_tokens: int | None
    max_requests: int
    dtype: str
    stock_tokens: int = 0
    ranks: int = 1

    @property
    def page_bytes(self) -> int:
        return self.plan.page.page_bytes

    @property
    def pool_bytes(self) -> int:
        """Of the device pool, its padding page included."""
        return (self.plan.physical_tokens // self.plan.page.page_tokens + 1) * self.page_bytes

    @property
    def mirror_bytes(self) -> int:
        """Of the host mirror, its padding page included."""
        return (self.plan.virtual_tokens // self.plan.page.page_tokens + 1) * self.page_bytes

    @property
    def host_mirror_bytes(self) -> int:
        """Of the host mirrors of all ranks."""
        return self.mirror_bytes * self.ranks

    @property
    def overhead_bytes(self) -> int:
        """Of LSA's buffers on the device."""
        return sum(self.plan.overhead.values())

    @property
    def unused_bytes(self) -> int:
        """Of the budget, what neither KV nor LSA's buffers take."""
        return max(0, self.budgeted_bytes - self.pool_bytes - self.overhead_bytes - self.window_bytes)

    @property
    def window_bytes(self) -> int:
        """What a model with a window of its own keeps of each request's last tokens, as SGLang sizes it; else 0."""
        if not self.plan.page.whole_prompts:
            return 0
        return max(0, self.budgeted_bytes - self.budgeted_tokens // self.plan.page.page_tokens * self.page_bytes)

    def fit(self, tokens: int) -> Fit:
        """How many contexts of so many tokens run at the same time."""
        return fit(
            self.config,
            self.plan,
            tokens,
            context_tokens=self.table_tokens,
            chunk_tokens=self.chunk_tokens,
            max_requests=self.max_requests,
            on_gpu=self.device == "cuda",
            stock_tokens=self.stock_tokens if self.plan.page.whole_prompts else None,
            expectations=self.expectations,
        )

    @property
    def expectations(self) -> dict[str, Expectation]:
        """What sets of its policies cover, where that is in a checkpoint."""
        if not self.config.auto or self.config.indexer is None:
            return {}
        measured = read_checkpoint_config(self.config.indexer).expectation
        return {} if measured is None else {str(self.config.policy): measured}


@dataclass(frozen=True)
class Assumed:
    """What is planned for instead of what this machine has, in bytes; None where this machine counts."""

    gpu_bytes: int | None = None
    host_bytes: int | None = None


def resolve(argv: Sequence[str], assumed: Assumed) -> Any:
    """SGLang's arguments for this command line, as the server would have them.

    Raises:
        ValueError, SystemExit: see :func:`sglang_lsa.launch_server.server_arguments`.
    """
    device = [] if assumed.gpu_bytes is None else ["--device", "cuda"]
    defaults = ["--log-level", "error", *device]  # what the user gave comes later, and wins
    with _as_if(assumed):
        return server_arguments([*defaults, *with_defaults(list(argv))])


def plan_server(server_args: Any, gpu: Gpu | None, assumed: Assumed) -> Server:
    """Plan the memory of a server.

    Args:
        server_args: from :func:`resolve`.
        gpu: of this machine.

    Raises:
        ValueError: the server would not start with so much memory, or its weights cannot be sized.
    """
    with arguments.published(server_args):
        return _planned(resolved(server_args), gpu, assumed)


def _planned(server_args: Any, gpu: Gpu | None, assumed: Assumed) -> Server:
    model, config = server_args.get_model_config(), server_args.lsa_config
    dtype = arguments.kv_dtype(server_args, model)
    shape = {
        "layers": max(model.num_hidden_layers, model.num_attention_layers),
        "itemsize": dtype.itemsize,
        "tp_size": server_args.tp_size,
    }
    extra, page = arguments.extra_context(server_args), arguments.kv_page(model, **shape)
    dummy = server_args.load_format == "dummy"
    ranks = server_args.tp_size
    quantization = server_args.quantization
    whole = weights_of(server_args.model_path, model.hf_config, model.dtype.itemsize, dummy, quantization)
    weights = whole if ranks == 1 else shared(whole, ranks)
    memory = _device_memory(server_args.device, gpu, assumed)
    if server_args.device != "cuda":
        memory = replace(memory, free_bytes=memory.free_bytes // ranks)
    budgeted = int(memory.free_bytes * server_args.mem_fraction_static) - weights.bytes
    if budgeted <= 0:
        raise ValueError(
            f"the weights ({weights.bytes / GB:.2f} GB) leave no memory for KV: the device has "
            f"{memory.free_bytes / GB:.2f} GB free, of which --mem-fraction-static {server_args.mem_fraction_static} "
            "may be used: raise that, or take a larger GPU or a smaller model"
        )
    stock = arguments.stock_tokens(server_args, model, page, budgeted)
    tokens = arguments.budgeted_tokens(model, stock)
    with _as_if(assumed):
        plan = plan_memory(
            config,
            page=page,
            budgeted_tokens=tokens,
            context_tokens=model.context_len,
            device=server_args.device,
            needs=arguments.server_needs(server_args, model, extra_context=extra, **shape),
            local_ranks=ranks,
        )
        host = HostMemory(host_mirror.available_host_memory(), ASSUMED if assumed.host_bytes is not None else MEASURED)
    chunk = server_args.chunked_prefill_size or 0
    return Server(
        name=server_args.model_path,
        device=server_args.device,
        config=config,
        memory=memory,
        host=host,
        weights=weights,
        static_share=server_args.mem_fraction_static,
        budgeted_bytes=budgeted,
        budgeted_tokens=tokens,
        stock_tokens=stock,
        plan=plan,
        context_tokens=model.context_len,
        table_tokens=model.context_len + extra,
        chunk_tokens=chunk if chunk > 0 else None,
        max_requests=server_args.max_running_requests,
        dtype=str(dtype).removeprefix("torch."),
        ranks=ranks,
    )


def _device_memory(device: str, gpu: Gpu | None, assumed: Assumed) -> DeviceMemory:
    if device == "cuda" and assumed.gpu_bytes is not None:
        return DeviceMemory(assumed.gpu_bytes, assumed.gpu_bytes - CUDA_CONTEXT_BYTES, ASSUMED)
    if device == "cuda" and gpu is not None:
        return DeviceMemory(gpu.total_bytes, gpu.free_bytes, MEASURED)
    if assumed.host_bytes is not None:
        return DeviceMemory(assumed.host_bytes, assumed.host_bytes, ASSUMED)
    import psutil

    return DeviceMemory(psutil.virtual_memory().total, arguments.free_memory_of_cpu(), MEASURED)


@contextmanager
def _as_if(assumed: Assumed) -> Iterator[None]:
    """SGLang and LSA decide as if this machine had what is assumed."""
    modules: tuple[Any, ...] = (sizing, host_mirror) if assumed.host_bytes is not None else ()
    originals = [(module, module.available_host_memory) for module in modules]
    with ExitStack() as stack:
        if assumed.gpu_bytes is not None:
            stack.enter_context(arguments.as_if_gpu(assumed.gpu_bytes))
        for module in modules:
            module.available_host_memory = lambda: assumed.host_bytes
        try:
            yield
        finally:
            for module, original in originals:
                module.available_host_memory = original
