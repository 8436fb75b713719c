"""What LSA refuses of arguments and models, also what SGLang's own checks would refuse first."""

from __future__ import annotations

import importlib
import inspect
import json
import pathlib
from types import SimpleNamespace
from typing import Any

import pytest
from made_arguments import arguments
from release import HERE, RELEASE

from sglang_lsa.config import LSAConfig
from sglang_lsa.indexer.checkpoint import ModelShape, config_from_json
from sglang_lsa.indexer.model import MemoryIndexer
from sglang_lsa.patches import uvicorn_run
from sglang_lsa.patches.compatibility import REFUSED_FLAGS, REFUSED_SINCE_0_5_22, Unsupported, attach
from sglang_lsa.patches.models import shape_of

pytestmark = pytest.mark.release


# what is new


@pytest.mark.skipif(not RELEASE.resolves_late, reason="this SGLang has none of it")
@pytest.mark.parametrize("name", [name for name, _, _ in REFUSED_SINCE_0_5_22])
def test_what_is_new_is_refused(name: str) -> None:
    fine = dict((flag, value) for flag, value, _ in REFUSED_SINCE_0_5_22)[name]
    with pytest.raises(Unsupported, match=f"--{name.replace('_', '-')} "):
        attach(arguments(**{name: not fine if isinstance(fine, bool) else 2}), LSAConfig())


@pytest.mark.skipif(not RELEASE.resolves_late, reason="this SGLang has none of it")
def test_what_is_new_and_no_flag_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Unsupported, match="--radix-eviction-policy tlru"):
        attach(arguments(radix_eviction_policy="tlru"), LSAConfig())
    monkeypatch.setenv("SGLANG_RUST_SERVER", "1")
    with pytest.raises(Unsupported, match="SGLANG_RUST_SERVER"):
        attach(arguments(), LSAConfig())


@pytest.mark.skipif(RELEASE.deepseek_v4, reason="this SGLang's can be paged")
def test_deepseek_v4_is_refused_and_told_which_release_has_it() -> None:
    other = SimpleNamespace(architectures=["DeepseekV4ForCausalLM"])
    with pytest.raises(Unsupported, match=r"use SGLang 0\.5\.17"):
        attach(arguments(model={"hf_config": other}), LSAConfig())


def test_arguments_that_fit() -> None:
    config = LSAConfig(budget=0.25, groups=False, calibrate="never")
    assert attach(arguments(), config).lsa_config is config
    assert attach(arguments(), LSAConfig(budget=0.25)).lsa_config == config, "what a CPU has of auto"


@pytest.mark.skipif(RELEASE.resolves_late, reason="refused with this SGLang")
def test_several_http_workers_fit() -> None:
    attach(arguments(tokenizer_worker_num=4), LSAConfig())


@pytest.mark.parametrize(
    ("name", "given", "words"),
    [
        ("api_key", "secret", "--api-key: not supported with --tokenizer-worker-num 2: SGLang checks no keys there"),
        ("admin_api_key", "secret", "--admin-api-key: not supported with --tokenizer-worker-num 2"),
        ("enable_http2", True, "--enable-http2: not supported with --tokenizer-worker-num 2"),
    ],
)
def test_what_several_http_workers_cannot_do_is_refused(name: str, given: Any, words: str) -> None:
    attach(arguments(**{name: given}), LSAConfig())
    with pytest.raises(Unsupported, match=words) as caught:
        attach(arguments(tokenizer_worker_num=2, **{name: given}), LSAConfig())
    assert "secret" not in str(caught.value)


def test_http_workers_serve_our_application() -> None:
    """uvicorn makes it in each of them; an application that is served from this process stays as it is."""
    (app, host), options = uvicorn_run.serve_our_application(uvicorn_run.SGLANG_APP, "here", workers=2)
    assert (host, options) == ("here", {"workers": 2, "factory": True})
    module, function = app.split(":")
    assert callable(getattr(importlib.import_module(module), function))
    assert uvicorn_run.serve_our_application(object(), host="here") is None
    source = inspect.getsource(importlib.import_module("sglang.srt.entrypoints.http_server")._setup_and_run_http_server)
    if HERE == "0.5.17":  # 0.5.23 is refused with several workers
        assert f'"{uvicorn_run.SGLANG_APP}",' in source, "what SGLang tells uvicorn"


@pytest.mark.parametrize(("name", "fine", "fix"), REFUSED_FLAGS, ids=[name for name, _, _ in REFUSED_FLAGS])
def test_every_listed_flag_is_refused(name: str, fine: Any, fix: str) -> None:
    bad = True if fine is False else fine + 1 if isinstance(fine, int) else "other"
    server_args = arguments(**{name: bad})
    with pytest.raises(Unsupported) as caught:
        attach(server_args, LSAConfig())
    flag = "--" + name.replace("_", "-")
    assert str(caught.value) == f"LSA cannot start:\n  {flag} {bad}: not supported with LSA yet: {fix}"
    assert not hasattr(server_args, "lsa_config")


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"is_hybrid_swa": True}, "model has sliding-window attention: .*use a dense model"),
        ({"attention_arch": SimpleNamespace(name="MLA")}, "model has MLA attention: .*use an MHA/GQA model"),
        ({"is_generation": False}, "model does not generate text: serve it without LSA"),
    ],
)
def test_models_that_cannot_work_are_refused(changed: dict[str, Any], words: str) -> None:
    with pytest.raises(Unsupported, match=words):
        attach(arguments(model=changed), LSAConfig())


SHAPE = {"hidden_size": 576, "num_hidden_layers": 30, "q_heads": 9, "kv_heads": 3, "head_dim": 64}
CHECKPOINT: dict[str, Any] = {"model": SHAPE, "heads": [[9, 3], [15, 0]]}


def write_indexer(folder: pathlib.Path, checkpoint: Any = CHECKPOINT) -> None:
    """An untrained one, with this as its configuration; where that is impossible, weights do not fit it."""
    try:
        config = config_from_json(checkpoint)
    except (ValueError, TypeError, KeyError, AttributeError):
        config = config_from_json(CHECKPOINT)
    MemoryIndexer(config).save(folder)
    (folder / "config.json").write_text(json.dumps(checkpoint))


@pytest.mark.parametrize(
    ("checkpoint", "words"),
    [
        (None, "has no config.json: give a folder written by sglang-lsa train"),
        ("no JSON", "config.json is no indexer configuration"),
        ("no weights", "model.safetensors does not fit config.json"),
        ([1], "config.json is no indexer configuration"),
        ({"model": SHAPE}, "config.json is no indexer configuration"),
        ({"model": {"hidden_size": 576}, "heads": [[9, 3]]}, "config.json is no indexer configuration"),
        ({**CHECKPOINT, "heads": []}, "config.json is no indexer configuration"),
        ({**CHECKPOINT, "heads": [[9, 9]]}, "config.json is no indexer configuration"),
        ({**CHECKPOINT, "model": {**SHAPE, "hidden_size": 4096}}, r"hidden_size=4096, .*; this one is of .*size=576"),
        (
            {**CHECKPOINT, "model": {**SHAPE, "kv_heads": 9}},
            r"--lsa-indexer /.* was trained for .*: use smollm2-135m-instruct, which comes with the package",
        ),
        (CHECKPOINT, None),
    ],
)
def test_the_indexer_must_belong_to_the_model(checkpoint: Any, words: str | None, tmp_path: pathlib.Path) -> None:
    if checkpoint is not None:
        write_indexer(tmp_path, CHECKPOINT if isinstance(checkpoint, str) else checkpoint)
        if checkpoint == "no JSON":
            (tmp_path / "config.json").write_text("{")
        elif checkpoint == "no weights":
            (tmp_path / "model.safetensors").write_bytes(b"")
    config = LSAConfig(indexer=str(tmp_path))
    if words is None:
        assert attach(arguments(), config).lsa_config.policy == "indexer"
        return
    with pytest.raises(Unsupported, match=words):
        attach(arguments(), config)


def test_where_no_indexer_fits_it_is_said_how_one_is_made() -> None:
    """And that heads can be found at the start instead."""
    text = SimpleNamespace(hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8)
    words = (
        "smollm2-135m-instruct was trained for .*: make one for it with sglang-lsa adapt, or .* --lsa-calibrate cached"
    )
    with pytest.raises(Unsupported, match=words):
        attach(arguments(model={"hf_text_config": text}), LSAConfig(indexer="smollm2-135m-instruct"))


def test_auto_needs_an_indexer_that_knows_what_its_sets_cover(tmp_path: pathlib.Path) -> None:
    write_indexer(tmp_path)
    config = LSAConfig(indexer=str(tmp_path), budget="auto")
    with pytest.raises(Unsupported, match="--lsa-budget auto needs an indexer that knows"):
        attach(arguments(), config)
    points = {"points": [[0, 0, 0], [1, 1, 1]], "source": "a test"}
    (tmp_path / "config.json").write_text(json.dumps({**CHECKPOINT, "expectation": points}))
    assert attach(arguments(), config).lsa_config.auto


@pytest.mark.parametrize(
    ("given", "kv_heads", "head_dim"),
    [
        ({"num_key_value_heads": 3, "head_dim": 80}, 3, 80),
        ({"num_key_value_heads": 3, "head_dim": None}, 3, 64),
        ({"num_key_value_heads": None}, 9, 64),
        ({}, 9, 64),
    ],
    ids=["all given", "no head_dim", "no KV heads", "neither"],
)
def test_shape_of_a_model(given: dict[str, Any], kv_heads: int, head_dim: int) -> None:
    """Configurations leave out what is as usual: one KV head a head, and heads that divide the width."""
    text = SimpleNamespace(hidden_size=576, num_hidden_layers=30, num_attention_heads=9, **given)
    assert shape_of(text) == ModelShape(576, 30, 9, kv_heads, head_dim)


def test_layers_are_not_chosen_beside_an_indexer(tmp_path: pathlib.Path) -> None:
    write_indexer(tmp_path)
    with pytest.raises(Unsupported, match=r"--lsa-observe-layers 1,2: the indexer .* leave the flag out"):
        attach(arguments(), LSAConfig(indexer=str(tmp_path), observe_layers=(1, 2)))
