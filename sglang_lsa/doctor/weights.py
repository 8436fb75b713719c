"""Bytes of a model's weights on the device, without reading them: from file headers, file sizes, or its shape."""

from __future__ import annotations

import json
import math
import pathlib
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

MEASURED, ASSUMED, COMPUTED = "measured", "assumed", "computed"
FLOATS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
"""Types of safetensors that become the model's own type when they are loaded, with their bytes."""
NARROWED = {"fp8": 1, "w8a8_fp8": 1}
"""Values of ``--quantization`` with which SGLang narrows what it loads itself, to so many bytes a number: matrices, but
not those of tokens, nor those that choose experts."""
FILES = ("*.bin", "*.pt", "*.gguf")


@dataclass(frozen=True)
class Weights:
    """Bytes on the device, and where that number is from: ``how`` is ``measured`` (from files) or ``computed``."""

    bytes: int
    how: str
    source: str


def weights_of(
    model_path: str, hf_config: Any, itemsize: int, dummy: bool = False, quantization: str | None = None
) -> Weights:
    """Size the weights of a model.

    Args:
        model_path: a folder, a GGUF file, or a hub name whose files may be in the cache. Nothing is downloaded.
        hf_config: its Hugging Face configuration.
        itemsize: bytes of one number of the type that the model is served in.
        dummy: no file will be read (``--load-format dummy``).
        quantization: of the server's arguments.

    Raises:
        ValueError: a file of weights is damaged, or there is none and no model can be made of the configuration.
    """
    narrowed = NARROWED.get(quantization or "")
    as_loaded = f", with --quantization {quantization}" if narrowed else ""
    path = None if dummy else _local(model_path)
    if path is not None and path.is_file():
        return Weights(path.stat().st_size, MEASURED, f"size of {path.name}")
    if path is not None:
        if files := sorted(path.glob("*.safetensors")):
            kept = getattr(hf_config, "quantization_config", None) is not None
            total = sum(safetensors_bytes(file, None if kept else itemsize, narrowed) for file in files)
            source = f"headers of {len(files)} safetensors file{'s' * (len(files) > 1)}"
            return Weights(total, MEASURED, source if kept else source + as_loaded)
        for pattern in FILES:
            if files := sorted(path.glob(pattern)):
                total = sum(file.stat().st_size for file in files)
                return Weights(total, MEASURED, f"size of {len(files)} {pattern[1:]} file{'s' * (len(files) > 1)}")
    total = sum(
        count * _item_bytes(name, dimensions, itemsize, narrowed)
        for name, dimensions, count in _parameters(hf_config, model_path)
    )
    return Weights(total, COMPUTED, f"shape of the model: no weights are here{as_loaded}")


def shared(weights: Weights, ranks: int) -> Weights:
    """What one of several ranks has of them: nearly all tensors are cut into as many parts."""
    return Weights(weights.bytes // ranks, COMPUTED, f"{weights.source}, shared by {ranks} ranks")


def safetensors_bytes(file: pathlib.Path, itemsize: int | None, narrowed: int | None = None) -> int:
    """Bytes of the tensors in a safetensors file once they are loaded.

    Args:
        itemsize: bytes that one number of a floating point tensor takes then; None when every tensor stays as it is.
        narrowed: bytes that one number of a matrix takes then, if that is less.

    Raises:
        ValueError: the file is none of safetensors, or shorter than its header says.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        try:
            (length,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(min(length, size)))
            tensors = {name: tensor for name, tensor in header.items() if name != "__metadata__"}
            ends = max((tensor["data_offsets"][1] for tensor in tensors.values()), default=0)
            total = sum(_tensor_bytes(name, tensor, itemsize, narrowed) for name, tensor in tensors.items())
        except (struct.error, ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(f"{file}: no safetensors file: download it again") from None
    if size < 8 + length + ends:
        raise ValueError(f"{file}: has {size} bytes, its header says {8 + length + ends}: download it again")
    return total


def _tensor_bytes(name: str, tensor: dict[str, Any], itemsize: int | None, narrowed: int | None) -> int:
    first, end = tensor["data_offsets"]
    if itemsize is None or tensor["dtype"] not in FLOATS:
        return int(end - first)
    return math.prod(tensor["shape"]) * _item_bytes(name, len(tensor["shape"]), itemsize, narrowed)


def _item_bytes(name: str, dimensions: int, itemsize: int, narrowed: int | None) -> int:
    wide = dimensions < 2 or "embed" in name or "lm_head" in name or name.endswith(".gate.weight")  # of experts
    return itemsize if narrowed is None or wide else min(narrowed, itemsize)


def _local(model_path: str) -> pathlib.Path | None:
    """Where the files of a model lie, if they do."""
    path = pathlib.Path(model_path)
    if path.exists():
        return path
    from huggingface_hub import snapshot_download

    try:
        return pathlib.Path(snapshot_download(model_path, local_files_only=True))
    except Exception:  # not in the cache, or no name of the hub
        return None


def _parameters(hf_config: Any, model_path: str) -> Iterator[tuple[str, int, int]]:
    """Name, dimensions and numbers of every tensor of a model of this shape, tied ones once; no memory is taken."""
    import torch
    import transformers
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    try:
        theirs = getattr(transformers, CONFIG_MAPPING_NAMES.get(hf_config.model_type, ""), None)
        if type(hf_config).__module__.startswith("sglang.") and theirs is not None:  # with fields of another model, too
            hf_config = theirs(**theirs.get_config_dict(model_path, local_files_only=True)[0])
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(hf_config)
    except Exception as error:
        raise ValueError(
            f"no weights are here, and transformers makes no model of the configuration ({error}): download the model"
        ) from None
    for name, parameter in model.named_parameters():
        yield name, parameter.dim(), parameter.numel()
