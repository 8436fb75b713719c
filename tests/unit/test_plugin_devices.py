"""Types of KV, devices, attention backends and CUDA graphs: what is filled in, and what is refused."""

from __future__ import annotations

import dataclasses
import pathlib
import pickle
from typing import Any

import pytest
import torch
from made_arguments import GPU, arguments, graphs, on_a_gpu
from release import RELEASE

from sglang_lsa.config import AUTO, LSAConfig
from sglang_lsa.patches import compatibility
from sglang_lsa.patches.automatic import with_calibration, with_groups
from sglang_lsa.patches.compatibility import (
    Unsupported,
    apply_defaults,
    attach,
    device_problems,
    flash_attention_problem,
)

pytestmark = pytest.mark.release


@pytest.mark.parametrize("name", ["mxfp8", "nvfp4", "fp4_mx_block16", "int8"])
def test_types_of_kv_that_cannot_work(name: str) -> None:
    fix = "use one of auto, bfloat16, bf16, fp8_e4m3, fp8_e5m2"
    with pytest.raises(Unsupported, match=f"--kv-cache-dtype {name}: not supported with LSA yet: {fix}"):
        attach(arguments(kv_cache_dtype=name), LSAConfig())


@pytest.mark.parametrize("computed", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["fp8_e4m3", "fp8_e5m2"])
def test_kv_in_fp8(name: str, computed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compatibility, "_cuda", lambda: True)
    on_gpu = {"device": "cuda", "attention_backend": "flashinfer"}
    for device in ({}, on_gpu):
        changed = {"kv_cache_dtype": name, "quantization_param_path": None, **device}
        attach(arguments(**changed, model={"dtype": f"torch.{computed}"}), LSAConfig())
    changed = {"kv_cache_dtype": "fp8_e4m3", "quantization_param_path": "s.json"}
    with pytest.raises(Unsupported, match=r"--quantization-param-path s\.json: .*reads it without them; leave it out"):
        attach(arguments(**changed), LSAConfig())


@pytest.mark.parametrize("name", ["bfloat16", "bf16"])
def test_kv_of_another_type_than_the_model_is_refused_on_a_gpu(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans of FlashInfer name one type for both; on a CPU what is read is converted."""
    monkeypatch.setattr(compatibility, "_cuda", lambda: True)
    changed = {"kv_cache_dtype": name, "model": {"dtype": "torch.float16"}}
    assert attach(arguments(**changed), LSAConfig())
    changed |= {"device": "cuda", "attention_backend": "flashinfer", "model": {"dtype": "torch.float16"}}
    with pytest.raises(Unsupported, match=f"--kv-cache-dtype {name}, but the model computes in float16: .*leave the"):
        attach(arguments(**changed), LSAConfig())
    assert attach(arguments(**{**changed, "model": {"dtype": "torch.bfloat16"}}), LSAConfig())


def test_defaults_leave_what_was_given() -> None:
    given = {"device": "cpu", "page_size": 32, "attention_backend": "triton", "chunked_prefill_size": 100}
    values = dict(given)
    apply_defaults(values, LSAConfig())
    assert values.items() >= given.items()
    assert values["radix_cache_backend"] == "lsa"


def test_defaults_of_a_gpu() -> None:
    """What is not listed here stays SGLang's."""
    values: dict[str, Any] = {"device": "cuda", "attention_backend": None}
    apply_defaults(values, LSAConfig())
    assert values == {
        "device": "cuda",
        "attention_backend": "flashinfer",
        "cuda_graph_backend_prefill": "disabled",
        "page_size": 64,
        "radix_cache_backend": "lsa",
        "max_running_requests": 256,
    }


@pytest.mark.parametrize(
    ("capability", "built", "given", "prefill"),
    [
        pytest.param((9, 0), True, {}, "fa3", id="Hopper"),
        pytest.param((9, 0), False, {}, None, id="Hopper, kernels not built"),
        pytest.param((8, 0), True, {}, None, id="Ampere"),
        pytest.param((10, 0), True, {}, None, id="Blackwell"),
        pytest.param((9, 0), True, {"attention_backend": "flashinfer"}, None, id="one backend asked for"),
        pytest.param((9, 0), True, {"prefill_attention_backend": "flashinfer"}, "flashinfer", id="prefill asked for"),
        pytest.param((9, 0), True, {"decode_attention_backend": "fa3"}, "fa3", id="decode asked for"),
        pytest.param((9, 0), True, {"kv_cache_dtype": "fp8_e5m2"}, None, id="KV that it cannot read"),
        pytest.param((9, 0), True, {"kv_cache_dtype": "fp8_e4m3"}, "fa3", id="KV in FP8"),
    ],
)
def test_prompts_are_read_by_the_fastest_kernels_that_are_there(
    capability: tuple[int, int],
    built: bool,
    given: dict[str, Any],
    prefill: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    on_a_gpu(monkeypatch, capability, built)
    values: dict[str, Any] = {"device": "cuda", **given}
    apply_defaults(values, LSAConfig())
    assert values.get("prefill_attention_backend") == prefill
    assert values["attention_backend"] == "flashinfer"
    assert values.get("decode_attention_backend") == given.get("decode_attention_backend")


@pytest.mark.parametrize(
    ("capability", "built", "changed", "words"),
    [
        ((8, 9), True, {}, "FlashAttention-3 is for GPUs of compute capability 9.x (Hopper), this one has 8.9"),
        ((9, 0), False, {}, "sgl_kernel has no FlashAttention-3 here"),
        ((9, 0), True, {"kv_cache_dtype": "fp8_e5m2"}, "FlashAttention-3 reads fp8_e4m3 only, not --kv-cache-dtype"),
    ],
)
def test_flash_attention_where_it_cannot_be_is_refused(
    capability: tuple[int, int], built: bool, changed: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_a_gpu(monkeypatch, capability, built)
    (problem,) = device_problems(arguments(**(GPU | {"attention_backend": "fa3"} | changed)), LSAConfig())
    assert problem.startswith(f"--attention-backend fa3: {words}")
    assert problem.endswith(": use flashinfer")


def test_the_gpu_that_is_looked_at_is_the_one_that_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    on_a_gpu(monkeypatch, (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda gpu: ((8, 0), (9, 0))[gpu])
    assert flash_attention_problem({"base_gpu_id": 1}) is None
    assert "has 8.0" in str(flash_attention_problem({"base_gpu_id": 0}))
    assert "has 8.0" in str(flash_attention_problem({}))


def test_kv_that_flash_attention_cannot_read_is_refused_before_another_backend_is_taken() -> None:
    """SGLang changes the flag to Triton's kernels before anybody can see what the user asked for."""
    values: dict[str, Any] = {"device": "cuda", "attention_backend": "fa3", "kv_cache_dtype": "fp8_e5m2"}
    with pytest.raises(
        Unsupported, match=r"--attention-backend fa3: FlashAttention-3 reads fp8_e4m3 only, .*use flash"
    ):
        apply_defaults(values, LSAConfig())


def test_flash_attention_where_it_can_be_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    on_a_gpu(monkeypatch, (9, 0))
    assert device_problems(arguments(**(GPU | {"attention_backend": "fa3"})), LSAConfig()) == []


@pytest.mark.parametrize(
    ("changed", "flag"),
    [
        ({"attention_backend": "fa3"}, "attention-backend"),
        ({"attention_backend": "flashinfer", "decode_attention_backend": "fa3"}, "decode-attention-backend"),
        ({"attention_backend": "flashinfer", "prefill_attention_backend": "fa3"}, None),
        ({"attention_backend": "fa3", "decode_attention_backend": "flashinfer"}, None),
    ],
)
def test_groups_need_flashinfer_in_decode(
    changed: dict[str, str], flag: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_a_gpu(monkeypatch, (9, 0))
    seen = device_problems(arguments(**(GPU | changed)), LSAConfig(groups=True))
    expected = f"--{flag} fa3: not supported with groups yet: use flashinfer"
    assert seen == ([] if flag is None else [expected])
    assert device_problems(arguments(**(GPU | changed)), LSAConfig()) == []


DECODES_ON: dict[str, tuple[dict[str, Any], bool]] = {
    "flashinfer": ({"device": "cuda", "attention_backend": "flashinfer"}, True),
    "flashinfer, prompts on fa3": (
        {"device": "cuda", "attention_backend": "flashinfer", "prefill_attention_backend": "fa3"},
        True,
    ),
    "fa3": ({"device": "cuda", "attention_backend": "fa3"}, False),
    "fa3 in decode only": (
        {"device": "cuda", "attention_backend": "flashinfer", "decode_attention_backend": "fa3"},
        False,
    ),
    "flashinfer in decode only": (
        {"device": "cuda", "attention_backend": "fa3", "decode_attention_backend": "flashinfer"},
        True,
    ),
    "not known": ({"device": "cuda", "attention_backend": None}, False),
    "cpu": ({"device": "cpu", "attention_backend": "torch_native"}, False),
    "kv in fp8": ({"device": "cuda", "attention_backend": "flashinfer", "kv_cache_dtype": "fp8_e4m3"}, False),
    "two ranks": ({"device": "cuda", "attention_backend": "flashinfer", "tp_size": 2}, False),
}


@pytest.mark.parametrize(("seen", "fits"), DECODES_ON.values(), ids=DECODES_ON)
@pytest.mark.parametrize("margin", [0.0, 0.2])
def test_groups_are_on_where_they_pay(seen: dict[str, Any], fits: bool, margin: float) -> None:
    given, asked = arguments(**seen), LSAConfig(groups=AUTO, group_margin=margin, calibrate="cached")
    found = with_groups(asked, given, dense=True)
    assert (found.groups, found.group_margin) == (fits, margin if fits else 0.0)
    assert found.calibrates and found == dataclasses.replace(asked, groups=fits, group_margin=found.group_margin)
    assert with_groups(asked, given, dense=False).groups is False, "DeepSeek-V4"
    assert with_groups(asked, given, dense=True, measured=False).groups is False, "SGLang 0.5.23"
    for said in (LSAConfig(groups=False), LSAConfig(groups=True)):
        assert with_groups(said, given, dense=True) is said


@pytest.mark.parametrize(
    ("changed", "found"),
    [
        ({"device": "cuda"}, "cached"),
        ({"device": "cuda", "tp_size": 2}, "never"),
        ({"device": "cuda", "kv_cache_dtype": "fp8_e5m2"}, "never"),
        ({"device": "cpu"}, "never"),
    ],
)
def test_heads_are_found_at_the_start_where_that_takes_seconds(changed: dict[str, Any], found: str) -> None:
    given = arguments(**changed)
    after = with_calibration(LSAConfig(), given, dense=True)
    assert (after.calibrate, after.calibrates, after.policy_is_default) == (found, found == "cached", True)
    assert not LSAConfig().calibrates and LSAConfig().may_calibrate
    assert with_calibration(LSAConfig(), given, dense=False).calibrate == "never", "DeepSeek-V4"
    assert with_calibration(LSAConfig(), given, dense=True, measured=False).calibrate == "never", "SGLang 0.5.23"
    for said in (LSAConfig(calibrate="always"), LSAConfig(calibrate="never"), LSAConfig(calibrate="cached")):
        assert with_calibration(said, given, dense=True) is said
    if found == "never":
        with pytest.raises(ValueError, match="budget"):
            with_calibration(LSAConfig(budget=AUTO), given, dense=True)
    else:
        assert with_calibration(LSAConfig(budget=AUTO), given, dense=True).calibrates


def test_servers_know_whether_they_have_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Auto is decided when arguments are checked, so that every process hears the same; it is never refused."""
    on_a_gpu(monkeypatch, (9, 0))
    for changed, fits in (({}, False), (GPU, True), (GPU | {"decode_attention_backend": "fa3"}, False)):
        for config in (LSAConfig(), LSAConfig(groups=AUTO)):
            given = attach(arguments(**changed), config)
            assert pickle.loads(pickle.dumps(given.lsa_config)).groups is (fits and RELEASE.measured)
    with pytest.raises(Unsupported, match="fa3: not supported with groups yet"):
        attach(arguments(**(GPU | {"decode_attention_backend": "fa3"})), LSAConfig(groups=True))
    assert attach(arguments(), LSAConfig(groups=True)).lsa_config.groups is True, "a CPU can, and shows it"


def test_defaults_of_a_gpu_leave_what_was_given() -> None:
    given = {"device": "cuda", "attention_backend": "triton", "cuda_graph_backend_prefill": "full"}
    values: dict[str, Any] = dict(given)
    apply_defaults(values, LSAConfig())
    assert values.items() >= given.items()
    values = {"device": "cuda", "cuda_graph_config": {"prefill": {"backend": "full"}}}
    apply_defaults(values, LSAConfig())
    assert "cuda_graph_backend_prefill" not in values


@pytest.mark.parametrize(
    "changed",
    [
        pytest.param({}, id="cpu"),
        pytest.param({"attention_backend": None}, id="cpu, backend not chosen yet"),
        pytest.param({"cuda_graph_config": graphs(prefill="full")}, id="cpu, graphs do not matter"),
        pytest.param(GPU, id="cuda"),
        pytest.param(GPU | {"decode_attention_backend": "flashinfer"}, id="cuda, backend of decode"),
        pytest.param(GPU | {"cuda_graph_config": graphs(decode="disabled")}, id="cuda, no graphs"),
        pytest.param(GPU | {"cuda_graph_config": None}, id="cuda, graphs not chosen yet"),
    ],
)
def test_devices_that_work(changed: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compatibility, "_cuda", lambda: True)
    assert device_problems(arguments(**changed), LSAConfig()) == []
    assert hasattr(attach(arguments(**changed), LSAConfig()), "lsa_config")


@pytest.mark.parametrize(
    ("changed", "cuda", "words"),
    [
        ({"device": "xpu"}, True, "--device xpu: not supported with LSA yet: use cpu or cuda"),
        (GPU, False, "--device cuda: torch sees no NVIDIA GPU here: use --device cpu"),
        (
            GPU | {"attention_backend": "torch_native"},
            True,
            "--attention-backend torch_native: not supported with LSA on this device (cuda): "
            "use flashinfer or fa3, or leave it out",
        ),
        (
            GPU | {"prefill_attention_backend": "trtllm_mha"},
            True,
            "--prefill-attention-backend trtllm_mha: not supported with LSA on this device (cuda): "
            "use flashinfer or fa3, or leave it out",
        ),
        (
            GPU | {"decode_attention_backend": "fa3"},
            True,
            "--decode-attention-backend fa3: torch sees no NVIDIA GPU here: use flashinfer",
        ),
        (
            {"attention_backend": "fa3"},
            True,
            "--attention-backend fa3: not supported with LSA on this device (cpu): use torch_native, or leave it out",
        ),
        (
            {"decode_attention_backend": "flashinfer"},
            True,
            "--decode-attention-backend flashinfer: not supported with LSA on this device (cpu): "
            "use torch_native, or leave it out",
        ),
        (
            GPU | {"cuda_graph_config": graphs(prefill="full")},
            True,
            "--cuda-graph-backend-prefill full: not supported with LSA yet: use disabled",
        ),
        (
            GPU | {"cuda_graph_config": graphs(decode="breakable")},
            True,
            "--cuda-graph-backend-decode breakable: not supported with LSA yet: use full",
        ),
    ],
)
def test_devices_that_cannot_work_are_refused(
    changed: dict[str, Any], cuda: bool, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compatibility, "_cuda", lambda: cuda)
    server_args = arguments(**changed)
    assert device_problems(server_args, LSAConfig()) == [words]
    with pytest.raises(Unsupported) as caught:
        attach(server_args, LSAConfig())
    assert str(caught.value) == f"LSA cannot start:\n  {words}"
    assert not hasattr(server_args, "lsa_config")


def test_a_recording_server_runs_without_decode_graphs(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    monkeypatch.setattr(compatibility, "_cuda", lambda: True)
    config = LSAConfig(record=str(tmp_path / "new"))
    given: dict[str, Any] = {}
    apply_defaults(given, config)
    assert given["cuda_graph_backend_decode"] == "disabled"
    words = "--cuda-graph-backend-decode full: not supported with --lsa-record: use disabled"
    assert device_problems(arguments(**GPU), config) == [words]
    fine = arguments(**GPU | {"cuda_graph_config": graphs(decode="disabled")})
    attached = attach(fine, config).lsa_config
    assert attached.record == config.record and not attached.calibrates
    assert (tmp_path / "new").is_dir()


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: pathlib.Path) -> None:
    (tmp_path / "file").write_text("")
    config = LSAConfig(record=str(tmp_path / "file"))
    with pytest.raises(Unsupported, match=r"--lsa-record .*file: cannot be written \(File exists\): give a folder"):
        attach(arguments(), config)
