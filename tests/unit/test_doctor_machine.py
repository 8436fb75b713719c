"""What ``sglang-lsa doctor`` says about a machine, its kernels and a model's weights."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from sglang_lsa.doctor import kernels, machine
from sglang_lsa.doctor.findings import NOTE, OK, SKIPPED, TROUBLE
from sglang_lsa.doctor.kernels import REFERENCE, kernel_finding, kernel_findings, kernel_mode
from sglang_lsa.doctor.machine import GB, Host, gpu_here, host_findings, host_here
from sglang_lsa.doctor.weights import Weights, safetensors_bytes, weights_of

# --- the machine -----------------------------------------------------------------------------------------------------


def test_a_gpu_that_torch_does_not_see(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(machine, "nvidia_smi", lambda: (["NVIDIA H100"], "550.1"))
    gpu, finding = gpu_here()
    assert gpu is None
    assert (finding.status, finding.seen) == (TROUBLE, "nvidia-smi sees NVIDIA H100 (driver 550.1), torch sees none")


def test_no_gpu_is_no_trouble(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(machine, "nvidia_smi", lambda: ([], None))
    assert gpu_here()[1].status == NOTE


def test_what_nvidia_smi_says(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'NVIDIA H100 80GB HBM3, 580.95.05'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert machine.nvidia_smi() == (["NVIDIA H100 80GB HBM3"], "580.95.05")
    program.write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed, because it could not reach the driver'\nexit 9\n")
    assert machine.nvidia_smi() == ([], None)


def test_this_host() -> None:
    host = host_here()
    assert 0 < host.free_bytes <= host.total_bytes
    assert host.memlock_bytes is None or host.memlock_bytes >= 0


HOST = Host(free_bytes=10 * GB, total_bytes=16 * GB, memlock_bytes=GB, shm_bytes=2 * GB)


@pytest.mark.parametrize(
    ("host", "mirror", "pinned", "statuses"),
    [
        pytest.param(HOST, 2 * GB, True, [OK, NOTE, OK], id="a mirror above the limit"),
        pytest.param(HOST, GB, True, [OK, OK, OK], id="a mirror at the limit"),
        pytest.param(HOST, 2 * GB, False, [OK, SKIPPED, OK], id="a CPU locks nothing"),
        pytest.param(dataclasses.replace(HOST, memlock_bytes=None), 2 * GB, True, [OK, OK, OK], id="no limit"),
        pytest.param(dataclasses.replace(HOST, shm_bytes=64 << 20), None, True, [OK, OK, NOTE], id="Docker's /dev/shm"),
        pytest.param(dataclasses.replace(HOST, shm_bytes=None), None, True, [OK, OK, NOTE], id="no /dev/shm"),
    ],
)
def test_a_host(host: Host, mirror: int | None, pinned: bool, statuses: list[str]) -> None:
    assert [finding.status for finding in host_findings(host, mirror, pinned)] == statuses


# --- kernels ---------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="there they run")
def test_without_a_gpu_kernels_are_not_run() -> None:
    assert kernel_mode() == REFERENCE
    mode, (finding,) = kernel_findings()
    assert (mode, finding.status) == (REFERENCE, SKIPPED)


def test_kernels_equal_their_references() -> None:
    """On a GPU as they are, elsewhere under Triton's interpreter, which must be chosen before they are imported."""
    program = (
        "import json, dataclasses; from sglang_lsa.doctor.kernels import kernel_findings; mode, found = "
        "kernel_findings(); print(json.dumps([mode, [dataclasses.asdict(f) for f in found]]))"
    )
    interpreted = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env={**os.environ, **interpreted}
    )
    assert run.returncode == 0, run.stderr[-2000:]
    mode, found = json.loads(run.stdout)
    assert mode == ("interpreted" if interpreted else "triton")
    assert [finding for finding in found if finding["status"] != OK] == []
    folder = pathlib.Path(kernels.__file__).parents[1] / "kernels"
    modules = {file.stem for file in folder.glob("*.py")}
    tables = dict.fromkeys(("decode_indices", "decode_pages", "physical_slots"), "page_table")
    assert {tables.get(finding["name"], finding["name"]) for finding in found} == modules


@pytest.mark.parametrize(
    ("seen", "words"),
    [
        pytest.param(torch.tensor([1.0, 2.5]), "differs from its reference by 0.5", id="wrong"),
        pytest.param(torch.tensor([1.0, float("nan")]), "differs from its reference by nan", id="not a number"),
        pytest.param(None, "failed (RuntimeError: no kernel image)", id="fails"),
    ],
)
def test_a_kernel_that_is_wrong(seen: torch.Tensor | None, words: str) -> None:
    def check(device: str) -> kernels.Outputs:
        if seen is None:
            raise RuntimeError("no kernel image")
        return seen, torch.tensor([1.0, 2.0]), 1e-3

    finding = kernel_finding("page_score", check, REFERENCE)
    assert finding.status == TROUBLE
    assert words in finding.seen


# --- weights ---------------------------------------------------------------------------------------------------------


def test_safetensors_in_the_type_that_is_served(tmp_path: pathlib.Path) -> None:
    """Floats are loaded in the model's type; what is quantized, and whole numbers, stay as they are."""
    tensors = {
        "a": torch.zeros(3, 5),
        "b": torch.zeros(7, dtype=torch.bfloat16),
        "c": torch.zeros(11, dtype=torch.int8),
    }
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert safetensors_bytes(tmp_path / "model.safetensors", 2) == 15 * 2 + 7 * 2 + 11
    assert safetensors_bytes(tmp_path / "model.safetensors", None) == 15 * 4 + 7 * 2 + 11
    save_file({"d": torch.zeros(4)}, tmp_path / "model-2.safetensors")
    config = argparse.Namespace()
    assert weights_of(str(tmp_path), config, 2) == Weights(55 + 8, "measured", "headers of 2 safetensors files")
    config.quantization_config = {"quant_method": "gptq"}
    assert weights_of(str(tmp_path), config, 2).bytes == 85 + 16


@pytest.mark.parametrize("content", [b"", b"\x02\0\0\0\0\0\0\0[]", b"\xff" * 20, b"version https://git-lfs.github.com"])
def test_a_file_that_is_no_safetensors(content: bytes, tmp_path: pathlib.Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.safetensors: no safetensors file: download it again"):
        safetensors_bytes(file, 2)


def test_a_file_that_is_cut_off(tmp_path: pathlib.Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(100)}, file)
    whole = file.stat().st_size
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match=f"has {whole - 1} bytes, its header says {whole}"):
        safetensors_bytes(file, 2)


@pytest.mark.parametrize("name", ["pytorch_model-1.bin", "model.gguf"])
def test_other_files_count_by_their_size(name: str, tmp_path: pathlib.Path) -> None:
    (tmp_path / name).write_bytes(b"x" * 123)
    found = weights_of(str(tmp_path), argparse.Namespace(), 2)
    assert (found.bytes, found.how) == (123, "measured")
    assert weights_of(str(tmp_path / name), argparse.Namespace(), 2).bytes == 123


@pytest.mark.parametrize("dummy", [False, True])
def test_without_files_the_shape_counts(dummy: bool, tmp_path: pathlib.Path) -> None:
    from transformers import LlamaConfig

    if dummy:
        save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    shape = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(**shape, vocab_size=32, tie_word_embeddings=True)
    numbers = 32 * 8 + 2 * (4 * 8 * 8 + 3 * 8 * 16 + 2 * 8) + 8
    assert weights_of(str(tmp_path), config, 2, dummy) == Weights(
        numbers * 2, "computed", "shape of the model: no weights are here"
    )


@pytest.mark.parametrize("name", ["fp8", "w8a8_fp8"])
def test_what_sglang_narrows_itself_counts_as_narrow(name: str, tmp_path: pathlib.Path) -> None:
    """Matrices, but not those of tokens, nor norms; what is quantized in its files stays as it is."""
    from transformers import LlamaConfig

    shape = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(**shape, vocab_size=32, tie_word_embeddings=False)
    narrow, wide = 2 * (4 * 8 * 8 + 3 * 8 * 16), 2 * 32 * 8 + 2 * 2 * 8 + 8
    found = weights_of(str(tmp_path), config, 2, quantization=name)
    assert found == Weights(
        narrow + 2 * wide, "computed", f"shape of the model: no weights are here, with --quantization {name}"
    )
    assert weights_of(str(tmp_path), config, 2, quantization="gptq").bytes == 2 * (narrow + wide)
    tensors = {
        "model.embed_tokens.weight": torch.zeros(32, 8),
        "model.layers.0.mlp.up_proj.weight": torch.zeros(16, 8),
        "model.norm.weight": torch.zeros(8),
        "lm_head.weight": torch.zeros(32, 8),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    assert weights_of(str(tmp_path), config, 2, quantization=name).bytes == 16 * 8 + 2 * (2 * 32 * 8 + 8)
    config.quantization_config = {"quant_method": "fp8"}
    assert weights_of(str(tmp_path), config, 2, quantization=name).bytes == 4 * (16 * 8 + 2 * 32 * 8 + 8)


def test_no_files_and_no_shape(tmp_path: pathlib.Path) -> None:
    from transformers import PretrainedConfig

    with pytest.raises(ValueError, match="no weights are here, and transformers makes no model of the configuration"):
        weights_of(str(tmp_path), PretrainedConfig(), 2)
