"""What LSA needs of SGLang's server arguments: defaults for what the user left open, refusals for what cannot work yet.

Works on the arguments' attributes; imports no SGLang.
"""

from __future__ import annotations

import importlib
import logging
import os
import pathlib
import tempfile
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

from sglang_lsa.config import PAGE_SIZE, LSAConfig
from sglang_lsa.memory.mirror import GB, require_host_memory
from sglang_lsa.patches.architectures import (
    DEEPSEEK_V4,
    deepseek_v4_problems,
    is_deepseek_v4,
    named_architecture,
    with_own_index,
)
from sglang_lsa.patches.automatic import decode_backend, with_calibration, with_groups
from sglang_lsa.patches.models import model_problems
from sglang_lsa.patches.releases import DEFAULT, installed
from sglang_lsa.patches.resolved import remember, resolved

logger = logging.getLogger(__name__)

RADIX_CACHE_BACKEND = "lsa"
E5M2 = "FlashAttention-3 reads fp8_e4m3 only, not --kv-cache-dtype fp8_e5m2"
BACKENDS = {"cpu": ("torch_native",), "cuda": ("flashinfer", "fa3")}
"""Attention backends that LSA extends, by device, the one that works everywhere first; users name them as they do
without LSA."""
BACKEND_FLAGS = ("attention_backend", "prefill_attention_backend", "decode_attention_backend")
FLASH_ATTENTION_ASKS = ("kv_cache_dtype", "base_gpu_id")
MAX_RUNNING_REQUESTS = 256
CPU_CHUNK = 2048
MOST_RANKS = 8
YES = ("1", "true", "yes", "y", "t", "on")
"""What SGLang takes for yes in a variable of the environment."""

BF16 = ("bfloat16", "bf16")
NO_GPU = "--device cuda: torch sees no NVIDIA GPU here"
KV_DTYPES = ("auto", *BF16, "fp8_e4m3", "fp8_e5m2")

REFUSED_FLAGS: tuple[tuple[str, Any, str], ...] = (
    # (attribute, value that is fine, what to do)
    ("speculative_algorithm", None, "remove --speculative-algorithm"),
    ("disaggregation_mode", "null", "remove --disaggregation-mode: LSA needs no separate prefill servers"),
    ("dcp_size", 1, "remove --dcp-size"),
    ("attn_cp_size", 1, "remove --attn-cp-size"),
    ("enable_prefill_cp", False, "remove --enable-prefill-cp"),
    ("pp_size", 1, "use --pp-size 1"),
    ("enable_dp_attention", False, "remove --enable-dp-attention"),
    ("dp_size", 1, "use --dp-size 1 and several servers behind a router"),
    ("nnodes", 1, "use one node"),
    ("enable_hierarchical_cache", False, "remove --enable-hierarchical-cache: LSA has its own host mirror"),
    ("enable_lmcache", False, "remove --enable-lmcache: LSA has its own host mirror"),
    ("enable_flexkv", False, "remove --enable-flexkv: LSA has its own host mirror"),
    ("enable_hisparse", False, "remove --enable-hisparse: LSA replaces it"),
    ("enable_unified_memory", False, "remove --enable-unified-memory"),
    ("enable_page_major_kv_layout", False, "remove --enable-page-major-kv-layout"),
    ("enable_memory_saver", False, "remove --enable-memory-saver"),
    ("enable_mixed_chunk", False, "remove --enable-mixed-chunk"),
    ("enable_torch_compile", False, "remove --enable-torch-compile"),
    ("enable_deterministic_inference", False, "remove --enable-deterministic-inference"),
    ("enable_pdmux", False, "remove --enable-pdmux"),
    ("enable_two_batch_overlap", False, "remove --enable-two-batch-overlap"),
    ("enable_streaming_session", False, "remove --enable-streaming-session"),
    ("enable_session_radix_cache", False, "remove --enable-session-radix-cache"),
    ("dllm_algorithm", None, "remove --dllm-algorithm"),
    ("is_embedding", False, "serve embedding models without LSA"),
    ("prefill_only_disable_kv_cache", False, "remove --prefill-only-disable-kv-cache: LSA needs a KV cache"),
    ("enable_return_routed_experts", False, "remove --enable-return-routed-experts: experts are kept by place in KV"),
    ("kv_canary", "none", "remove --kv-canary: it knows one number of a token's place in KV, LSA has two"),
    ("page_size", PAGE_SIZE, f"use --page-size {PAGE_SIZE} or leave it out"),
    ("radix_cache_backend", RADIX_CACHE_BACKEND, "remove --radix-cache-backend: LSA brings its own"),
)

REFUSED_SINCE_0_5_22: tuple[tuple[str, Any, str], ...] = (
    ("enable_unified_cache_external_linker", False, "remove --enable-unified-cache-external-linker"),
    ("enable_pd_role_switch", False, "remove --enable-pd-role-switch"),
    ("enable_kv_cache_sharding", False, "remove --enable-kv-cache-sharding"),
    ("attn_dp_size", 1, "remove --attn-dp-size"),
    ("tp_size", 1, f"use --tp-size 1, or SGLang {DEFAULT}"),
    ("enable_nvidia_megakernel", False, "remove --enable-nvidia-megakernel"),
    ("startup_weight_load_mode", "serial", "remove --startup-weight-load-mode: LSA looks at weights when they load"),
    ("tokenizer_worker_num", 1, f"use one worker, or SGLang {DEFAULT}: its workers would serve without LSA"),
)


class Unsupported(ValueError):
    """The server was asked for something that LSA cannot do; it serves nothing.

    Attributes:
        problems: one line each, with the value seen and what to do.
    """

    def __init__(self, problems: Sequence[str]):
        super().__init__("LSA cannot start:\n  " + "\n  ".join(problems))
        self.problems = tuple(problems)


def apply_defaults(arguments: MutableMapping[str, Any], config: LSAConfig) -> None:
    """Fill in what the user left open, before SGLang resolves its arguments. What was given is not touched."""
    defaults: dict[str, Any] = {
        "page_size": PAGE_SIZE,
        "radix_cache_backend": RADIX_CACHE_BACKEND,
        "max_running_requests": MAX_RUNNING_REQUESTS,
    }
    if arguments.get("device") is None and not _cuda():
        defaults["device"] = "cpu"
    if (arguments.get("device") or defaults.get("device")) == "cpu":
        defaults |= {
            "attention_backend": BACKENDS["cpu"][0],
            "sampling_backend": "pytorch",
            "grammar_backend": "llguidance",  # xgrammar pins memory, which takes a driver
            "chunked_prefill_size": CPU_CHUNK,
        }
        arguments["sleep_on_idle"] = True  # an idle scheduler would otherwise spin on one of the few cores
    elif named_architecture(arguments) == DEEPSEEK_V4:
        del defaults["page_size"]  # SGLang knows pages, attention backend and graphs of this one
    else:
        if arguments.get("kv_cache_dtype") == "fp8_e5m2" and arguments.get("attention_backend") == "fa3":
            # SGLang would take Triton's kernels without a word, and LSA then refuse these.
            raise Unsupported([f"--attention-backend fa3: {E5M2}: use flashinfer"])
        # FlashAttention-3 is the faster one for prompts, FlashInfer where requests that decode share a prefix.
        if not any(arguments.get(name) for name in BACKEND_FLAGS[:2]) and flash_attention_problem(arguments) is None:
            defaults["prefill_attention_backend"] = "fa3"
        defaults["attention_backend"] = BACKENDS["cuda"][0]
        if arguments.get("cuda_graph_config") is None:
            defaults["cuda_graph_backend_prefill"] = "disabled"
            if config.record:  # what is recorded grows with every step
                defaults["cuda_graph_backend_decode"] = "disabled"
    for name, value in defaults.items():
        if arguments.get(name) is None:
            arguments[name] = value


def attach(server_args: Any, config: LSAConfig) -> Any:
    """Put ``config`` on resolved server arguments, after checking that both can work together.

    Raises:
        Unsupported: naming everything that cannot, with the value seen and what to do.
    """
    given, server_args = server_args, resolved(server_args)
    model = server_args.get_model_config()
    other = is_deepseek_v4(model)
    if other and not installed().deepseek_v4:
        raise Unsupported(
            [f"{model.model_path} is {DEEPSEEK_V4}: not supported with LSA in this SGLang yet: use SGLang {DEFAULT}"]
        )
    problems = [
        f"--{name.replace('_', '-')} {seen}: not supported with LSA yet: {fix}"
        for name, fine, fix in (*REFUSED_FLAGS, *(REFUSED_SINCE_0_5_22 if installed().resolves_late else ()))
        if (seen := getattr(server_args, name, fine)) != fine and not (other and name == "page_size")
    ]
    problems += worker_problems(server_args)
    if installed().resolves_late:
        if server_args.radix_eviction_policy == "tlru":
            problems.append("--radix-eviction-policy tlru: not supported with LSA yet: use lru or lfu")
        if os.environ.get("SGLANG_RUST_SERVER", "").lower() in YES:
            problems.append("SGLANG_RUST_SERVER: that server has no place for LSA's routes and checks: unset it")
        if os.environ.get("SGLANG_ENABLE_METADATA_GLUE_GRAPH", "").lower() in YES:
            problems.append(
                "SGLANG_ENABLE_METADATA_GLUE_GRAPH: a graph would not see that resident sets change: unset it"
            )
        if server_args.device == "cuda":
            logger.warning(
                "LSA: with this SGLang answers and the speed of one request were compared on a GPU, under torch 2.11; "
                "all other figures are of SGLang %s",
                DEFAULT,
            )
    if not other:
        problems += device_problems(server_args, config)
    elif server_args.device == "cuda" and not _cuda():
        problems.append(f"{NO_GPU}: {DEEPSEEK_V4} needs one")
    if config.host_memory_gb is not None:
        try:
            require_host_memory(
                int(config.host_memory_gb * GB), f"--lsa-host-memory-gb {config.host_memory_gb}", "lower it"
            )
        except ValueError as error:
            problems.append(str(error))
    if other:
        problems += deepseek_v4_problems(server_args, model, config)
    else:
        problems += kv_problems(server_args, model) + model_problems(model, config)
    problems += rank_problems(server_args, model, config)
    if config.record is not None:
        problems += folder_problems(config.record)
    try:
        config = with_calibration(config, server_args, dense=not other, measured=installed().measured)
    except ValueError as error:
        problems.append(str(error))
    if problems:
        raise Unsupported(problems)
    if other:
        config = with_own_index(config)
    config = with_groups(config, server_args, dense=not other, measured=installed().measured)
    remember(given, "lsa_config", config)
    return given


def kv_problems(server_args: Any, model: Any) -> list[str]:
    """What about the type of KV cannot work, one line each, as far as flags decide it."""
    asked, computed = server_args.kv_cache_dtype, str(model.dtype).removeprefix("torch.")
    if asked not in KV_DTYPES:
        return [f"--kv-cache-dtype {asked}: not supported with LSA yet: use one of {', '.join(KV_DTYPES)}"]
    if asked == "fp8_e4m3" and server_args.quantization_param_path is not None:
        return [
            f"--quantization-param-path {server_args.quantization_param_path}: not supported with LSA: SGLang divides "
            "KV by these scales and reads it without them; leave it out, or use a checkpoint that has its scales"
        ]
    if server_args.device == "cuda" and asked in BF16 and computed != "bfloat16":
        return [
            f"--kv-cache-dtype {asked}, but the model computes in {computed}: not supported with LSA on a GPU yet: "
            "leave the flag out, or use --dtype bfloat16"
        ]
    return []


def rank_problems(server_args: Any, model: Any, config: LSAConfig) -> list[str]:
    """What cannot work with several ranks (tensor parallelism), one line each."""
    ranks = getattr(server_args, "tp_size", 1)
    if ranks == 1:
        return []
    where = f"--tp-size {ranks}: "
    if is_deepseek_v4(model):
        return [f"{where}not supported with LSA and {DEEPSEEK_V4} yet: use --tp-size 1"]
    if ranks > MOST_RANKS:
        return [f"{where}not supported with LSA yet: use 2 to {MOST_RANKS}"]
    text, problems = model.hf_text_config, []
    heads = text.num_attention_heads
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    if heads % ranks:
        fine = [str(n) for n in range(2, MOST_RANKS + 1) if not heads % n and (not kv_heads % n or not n % kv_heads)]
        problems.append(
            f"{where}{model.model_path} has {heads} attention heads, which cannot be shared by {ranks} ranks: use "
            f"{', '.join(['--tp-size 1', *fine])}"
        )
    elif kv_heads % ranks and ranks % kv_heads:
        problems.append(
            f"{where}{model.model_path} has {kv_heads} KV heads, which can neither be shared by {ranks} ranks nor "
            "repeated on them: use a number that divides them, or a multiple of them"
        )
    elif kv_heads < ranks:
        logger.warning(
            "LSA: %d KV heads on %d ranks: each is kept on %d of them, so that KV takes %d times the memory, on the "
            "devices and in the host mirrors",
            *(kv_heads, ranks, ranks // kv_heads, ranks // kv_heads),
        )
    if config.record is not None:
        problems.append(f"--lsa-record with {where}a rank sees some of the heads only: record with --tp-size 1")
    return problems


def worker_problems(server_args: Any) -> list[str]:
    """What cannot work with several HTTP workers, one line each."""
    workers = getattr(server_args, "tokenizer_worker_num", 1)
    if workers == 1:
        return []
    where = f"not supported with --tokenizer-worker-num {workers}"
    # SGLang's workers end when there is an API key, and look for no administrator's, who /lsa/config is for.
    problems = [
        f"--{name}: {where}: SGLang checks no keys there; use one worker, or let a proxy check them"
        for name in ("api-key", "admin-api-key")
        if getattr(server_args, name.replace("-", "_"), None)
    ]
    if getattr(server_args, "enable_http2", False):
        problems.append(f"--enable-http2: {where}: the workers would serve without LSA; remove one of the two")
    return problems


def folder_problems(path: str) -> list[str]:
    """Why recordings cannot be written to this folder, which is made if need be."""
    try:
        folder = pathlib.Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return []
    except OSError as error:
        return [f"--lsa-record {path}: cannot be written ({error.strerror}): give a folder that this user can write"]


def device_problems(server_args: Any, config: LSAConfig) -> list[str]:
    """What about device, attention backend and CUDA graphs cannot work, one line each."""
    device = server_args.device
    if device not in BACKENDS:
        return [f"--device {device}: not supported with LSA yet: use {' or '.join(BACKENDS)}"]
    if device == "cuda" and not _cuda():
        return [f"{NO_GPU}: use --device cpu"]
    seen = {name: value for name in BACKEND_FLAGS if (value := getattr(server_args, name, None)) is not None}
    problems = [
        f"--{flag(name)} {value}: not supported with LSA on this device ({device}): "
        f"use {' or '.join(BACKENDS[device])}, or leave it out"
        for name, value in seen.items()
        if value not in BACKENDS[device]
    ]
    asked = [name for name, value in seen.items() if value == "fa3" and value in BACKENDS[device]]
    if (
        asked
        and (
            problem := flash_attention_problem(
                {name: getattr(server_args, name, None) for name in FLASH_ATTENTION_ASKS}
            )
        )
        is not None
    ):
        problems += [f"--{flag(name)} fa3: {problem}: use flashinfer" for name in asked]
    decides, backend = decode_backend(server_args)
    if config.groups is True and backend == "fa3":
        problems.append(f"--{flag(decides)} fa3: not supported with groups yet: use flashinfer")
    graphs = getattr(server_args, "cuda_graph_config", None)
    if device == "cuda" and graphs is not None:
        decode, why = (("disabled",), "with --lsa-record") if config.record else (("disabled", "full"), "with LSA yet")
        for phase, backend, fine, where in (
            ("prefill", graphs.prefill.backend, ("disabled",), "with LSA yet"),
            ("decode", graphs.decode.backend, decode, why),
        ):
            if backend not in fine:
                problems.append(f"--cuda-graph-backend-{phase} {backend}: not supported {where}: use {fine[-1]}")
    return problems


def flag(name: str) -> str:
    """Of an attribute of SGLang's arguments, without the dashes before it."""
    return name.replace("_", "-")


def flash_attention_problem(arguments: Mapping[str, Any]) -> str | None:
    """Why FlashAttention-3 cannot be used here with these arguments of the server; None if it can."""
    import torch

    if arguments.get("kv_cache_dtype") == "fp8_e5m2":
        return E5M2
    if not (_cuda() and torch.cuda.is_available()):
        return "torch sees no NVIDIA GPU here"
    major, minor = torch.cuda.get_device_capability(arguments.get("base_gpu_id") or 0)
    if major != 9:
        return f"FlashAttention-3 is for GPUs of compute capability 9.x (Hopper), this one has {major}.{minor}"
    try:
        importlib.import_module("sgl_kernel.flash_attn")
    except ImportError as error:
        return f"sgl_kernel has no FlashAttention-3 here ({error})"
    return None


def announce_attention(server_args: Any) -> None:
    """Say which kernels attend, and why not those that SGLang would have chosen."""
    server_args = resolved(server_args)
    prefill, decode = server_args.get_attention_backends()
    if is_deepseek_v4(server_args.get_model_config()):
        logger.info("LSA: attention by %s, over tables of resident pages", decode)
        return
    stock = server_args._get_default_attn_backend(server_args.use_mla_backend(), server_args.get_model_config())
    logger.info(
        "LSA: attention by %s (prefill) and %s (decode)%s",
        prefill,
        decode,
        "" if stock in BACKENDS["cuda"] else f"; SGLang's own default here, {stock}, is not supported with LSA yet",
    )


def _cuda() -> bool:
    import torch

    return torch.cuda.is_available()
