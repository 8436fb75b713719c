"""``sglang-lsa record`` on a real server against transformers: the same queries, keys and attention."""

from __future__ import annotations

import pathlib
import re
import subprocess
import sys
from functools import partial

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.llama import modeling_llama

from sglang_lsa.config import PAGE_SIZE
from sglang_lsa.indexer.checkpoint import read_checkpoint_config
from sglang_lsa.indexer.heads import retrieval_heads
from sglang_lsa.indexer.manifest import Manifest
from sglang_lsa.indexer.recording import BLOCK, read_recording
from sglang_lsa.training.record import record

pytestmark = [pytest.mark.server, pytest.mark.slow]
EXAMPLES = pathlib.Path(__file__).resolve().parents[2] / "examples"
LAYERS, OBSERVED = 6, (2, 4)
FLAGS = "--dtype float32 --chunked-prefill-size 384 --lsa-device-tokens 4096 --lsa-host-memory-gb 0.2 --lsa-debug "
FLAGS += "--json-model-override-args '{\"num_hidden_layers\": 6}' --lsa-observe-layers 2,4"


rotate = modeling_llama.apply_rotary_pos_emb


def keep(seen: list[tuple[torch.Tensor, torch.Tensor]], *given: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and keys ``[1, heads, tokens, head_dim]`` after rotary embedding, one pair a layer."""
    seen.append(rotate(*given))
    return seen[-1]


def ask(output: pathlib.Path, model: str, **changed: object) -> int:
    options: dict[str, object] = {
        "splits": ["train"],
        "lengths": [900],
        "each": 1,
        "families": ["facts", "records"],
        "texts": None,
        "last": 200,
        "new_tokens": 20,
        "layers": 2,
        "server_args": FLAGS,
    }
    return record(output, model, **(options | changed))  # type: ignore[arg-type]


def test_recordings_equal_transformers(
    model_path: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert ask(tmp_path, model_path, servers=2) == 2, "by two servers, one prompt each"
    assert len(list(tmp_path.glob("server-*.log"))) == 2
    assert ask(tmp_path, model_path) == 0, "everything is recorded already, and no server is started"
    model = AutoModelForCausalLM.from_pretrained(
        model_path, num_hidden_layers=LAYERS, dtype=torch.float32, attn_implementation="eager"
    )
    manifest = Manifest.open(tmp_path)
    assert set(manifest.entries) == {"train-facts-900-0", "train-records-900-0"}
    for entry in manifest.entries.values():
        facts, tensors = read_recording(manifest.file(entry.name))
        assert facts.tokens in (entry.tokens + 19, entry.tokens + 20)
        assert facts.layers == OBSERVED
        ids = tensors["input_ids"].long()
        rotated: list[tuple[torch.Tensor, torch.Tensor]] = []
        monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", partial(keep, rotated))
        with torch.no_grad():
            seen = model(ids[None], output_attentions=True)
        queries, keys = (
            torch.stack([rotated[layer][which][0].transpose(0, 1) for layer in OBSERVED], dim=1) for which in (0, 1)
        )
        torch.testing.assert_close(tensors["queries"], queries[facts.first :], atol=2e-2, rtol=1e-3)
        full = len(ids) // PAGE_SIZE
        runs = keys[: full * PAGE_SIZE].unflatten(0, (full, 32, 2)).mean(dim=2)
        torch.testing.assert_close(tensors["runs"], runs, atol=2e-2, rtol=1e-3)
        attention = torch.cat(seen.attentions, dim=1)[0]  # [layers * heads, tokens, tokens]
        blocks, pages = len(tensors["mass"]), tensors["mass"].shape[2]
        padded = torch.nn.functional.pad(attention, (0, pages * PAGE_SIZE - len(ids)))
        by_page = padded.unflatten(2, (pages, PAGE_SIZE)).sum(dim=3)[:, facts.start : facts.start + blocks * BLOCK]
        mass = by_page.unflatten(1, (blocks, BLOCK)).amax(dim=2).transpose(0, 1)
        torch.testing.assert_close(tensors["mass"].float(), mass, atol=2e-3, rtol=0)


def test_an_indexer_is_trained_as_in_the_example(model_path: str, tmp_path: pathlib.Path) -> None:
    """``examples/train_indexer.py`` records, trains, measures, serves and asks. No layers are named: they are found
    with a few short prompts, whose recordings stay beside the others."""
    flags = FLAGS.replace(" --lsa-observe-layers 2,4", "")
    done = subprocess.run(
        [
            *(sys.executable, str(EXAMPLES / "train_indexer.py"), "--output", str(tmp_path), "--model", model_path),
            *("--lengths", "900", "--each", "1", "--steps", "6", "--ask-tokens", "1200"),
            f"--server-args={flags}",
        ],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    recordings = tmp_path / "recordings"
    probed = Manifest.open(recordings / "probe")
    assert {entry.family for entry in probed.entries.values()} == {"facts", "pairs", "records"}
    heads = retrieval_heads(recordings / "probe", 999, observed_only=False)
    facts, _ = read_recording(Manifest.open(recordings).file("train-facts-900-0"), ())
    assert facts.layers == tuple(sorted(list(dict.fromkeys(layer for layer, _ in heads))[:4]))
    assert set(read_checkpoint_config(tmp_path / "indexer").layers) <= set(facts.layers)
    assert (tmp_path / "recall.json").stat().st_size
    commands = [line.split()[1:4] for line in done.stdout.splitlines() if line.startswith("$ ")]
    assert [words[1] for words in commands[:3]] == ["record", "train", "recall"]
    full, default, seven = (saved_line(done.stdout, name) for name in ("full attention", "server's default", "7 %"))
    assert full[0] == full[1] == default[1] > default[0] >= seven[0]


def saved_line(printed: str, name: str) -> tuple[int, int]:
    """Resident and all pages in the line of ``examples/compare_budgets.py`` that is named so."""
    (line,) = (line for line in printed.splitlines() if name in line)
    resident, context = re.search(r"(\d+) of (\d+) pages resident", line).groups()  # type: ignore[union-attr]
    return int(resident), int(context)


def test_a_server_that_does_not_record_says_so(lsa) -> None:
    with pytest.raises(Exception) as refused:
        lsa.post("/generate", {"text": "x", "sampling_params": {"custom_params": {"lsa": {"record": 8}}}})
    assert refused.value.code == 400  # type: ignore[attr-defined]
    assert "--lsa-record" in refused.value.read().decode()  # type: ignore[attr-defined]
