"""SGLang's arguments as far as LSA looks at them, without SGLang."""

from __future__ import annotations

import sys
import types
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sglang_lsa.patches.compatibility import REFUSED_FLAGS, REFUSED_SINCE_0_5_22


def arguments(**changed: Any) -> SimpleNamespace:
    text = SimpleNamespace(hidden_size=576, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3)
    model = SimpleNamespace(
        model_path="model",
        is_hybrid_swa=False,
        sliding_window_size=None,
        attention_chunk_size=None,
        attention_arch=SimpleNamespace(name="MHA"),
        head_dim=64,
        v_head_dim=64,
        dtype="torch.bfloat16",
        hf_config=SimpleNamespace(architectures=["LlamaForCausalLM"], get_text_config=lambda: text),
        hf_text_config=text,
        linear_attn_registry_result=None,
        is_generation=True,
        num_hidden_layers=30,
    )
    vars(model).update(changed.pop("model", {}))
    values = {name: fine for name, fine, _ in (*REFUSED_FLAGS, *REFUSED_SINCE_0_5_22)}
    values |= {
        "radix_eviction_policy": "lru",
        "kv_cache_dtype": "auto",
        "device": "cpu",
        "attention_backend": "torch_native",
        "prefill_attention_backend": None,
        "decode_attention_backend": None,
        "get_model_config": lambda: model,
        "_model_config": model,  # where 0.5.23 keeps it
    }
    return SimpleNamespace(**{**values, **changed})


def on_a_gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], flash_attention: bool = True) -> None:
    """As if torch saw one, and SGLang's kernels were built for it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda gpu: capability)
    found: Any = types.ModuleType("sgl_kernel.flash_attn") if flash_attention else None
    monkeypatch.setitem(sys.modules, "sgl_kernel", types.ModuleType("sgl_kernel"))
    monkeypatch.setitem(sys.modules, "sgl_kernel.flash_attn", found)


def graphs(prefill: str = "disabled", decode: str = "full") -> SimpleNamespace:
    return SimpleNamespace(prefill=SimpleNamespace(backend=prefill), decode=SimpleNamespace(backend=decode))


GPU: dict[str, Any] = {"device": "cuda", "attention_backend": "flashinfer", "cuda_graph_config": graphs()}
