"""Bytes of a model's weights on the device, without reading them: from file headers, file sizes, or its shape."""

from __future__ import annotations

import json
import math
import pathlib
import struct
from dataclasses import dataclass
from typing import Any

MEASURED, ASSUMED, COMPUTED = "measured", "assumed", "computed"
FLOATS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
"""Types of safetensors that become the model's own type when they are loaded, with their bytes."""
FILES = ("*.bin", "*.pt", "*.gguf")


@dataclass(frozen=True)
class Weights:
    """Bytes on the device, and where that number is from: ``how`` is ``measured`` (from files) or ``computed``."""

    bytes: int
    how: str
    source: str


def weights_of(model_path: str, hf_config: Any, itemsize: int, dummy: bool = False) -> Weights:
    """Size the weights of a model.

    Args:
        model_path: a folder, a GGUF file, or a hub name whose files may be in the cache. Nothing is downloaded.
        hf_config: its Hugging Face configuration.
        itemsize: bytes of one number of the type that the model is served in.
        dummy: no file will be read (``--load-format dummy``).

    Raises:
        ValueError: a file of weights is damaged, or there is none and no model can be made of the configuration.
    """
    path = None if dummy else _local(model_path)
    if path is not None and path.is_file():
        return Weights(path.stat().st_size, MEASURED, f"size of {path.name}")
    if path is not None:
        quantized = getattr(hf_config, "quantization_config", None) is not None
        if files := sorted(path.glob("*.safetensors")):
            total = sum(safetensors_bytes(file, None if quantized else itemsize) for file in files)
            return Weights(total, MEASURED, f"headers of {len(files)} safetensors file{'s' * (len(files) > 1)}")
        for pattern in FILES:
            if files := sorted(path.glob(pattern)):
                total = sum(file.stat().st_size for file in files)
                return Weights(total, MEASURED, f"size of {len(files)} {pattern[1:]} file{'s' * (len(files) > 1)}")
    return Weights(_parameters(hf_config, model_path) * itemsize, COMPUTED, "shape of the model: no weights are here")


def shared(weights: Weights, ranks: int) -> Weights:
    """What one of several ranks has of them: nearly all tensors are cut into as many parts."""
    return Weights(weights.bytes // ranks, COMPUTED, f"{weights.source}, shared by {ranks} ranks")


def safetensors_bytes(file: pathlib.Path, itemsize: int | None) -> int:
    """Bytes of the tensors in a safetensors file once they are loaded.

    Args:
        itemsize: bytes that one number of a floating point tensor takes then; None when every tensor stays as it is.

    Raises:
        ValueError: the file is none of safetensors, or shorter than its header says.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        try:
            (length,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(min(length, size)))
            tensors = [tensor for name, tensor in header.items() if name != "__metadata__"]
            ends = max((tensor["data_offsets"][1] for tensor in tensors), default=0)
            total = sum(_tensor_bytes(tensor, itemsize) for tensor in tensors)
        except (struct.error, ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(f"{file}: no safetensors file: download it again") from None
    if size < 8 + length + ends:
        raise ValueError(f"{file}: has {size} bytes, its header says {8 + length + ends}: download it again")
    return total


def _tensor_bytes(tensor: dict[str, Any], itemsize: int | None) -> int:
    first, end = tensor["data_offsets"]
    if itemsize is None or tensor["dtype"] not in FLOATS:
        return int(end - first)
    return math.prod(tensor["shape"]) * itemsize


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


def _parameters(hf_config: Any, model_path: str) -> int:
    """Numbers in the weights of a model of this shape, tied ones counted once; takes no memory for them."""
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
    return sum(parameter.numel() for parameter in model.parameters())
