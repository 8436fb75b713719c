"""The recorder against plain attention: chunks, decode steps, strangers in the batch, and what ends a recording."""

from __future__ import annotations

import pathlib
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from sglang_lsa.config import PAGE_SIZE, RECORDED_POSITIONS
from sglang_lsa.engine.request import Asked, Request
from sglang_lsa.engine.step import DECODE, EXTEND, Step
from sglang_lsa.indexer.recorder import Recorder
from sglang_lsa.indexer.recording import BLOCK, BadRecording, read_recording, write_recording
from sglang_lsa.kernels.bound_score import bound_score_reference
from sglang_lsa.kernels.page_keys import key_bounds
from sglang_lsa.memory.layout.mha import MhaLayout
from sglang_lsa.patches.requests import is_complete, text_of

LAYERS, Q_HEADS, KV_HEADS, DIM = 3, 4, 2, 8
OBSERVED = (0, 2)
POSITIONS = 24
POOL_PAGES = 12


class Server:
    """One request of interest, ``tokens`` long, and what its model shows at every position."""

    def __init__(self, folder: pathlib.Path, tokens: int, last: int):
        made = torch.Generator().manual_seed(tokens)
        self.keys = [torch.randn((POOL_PAGES * PAGE_SIZE, KV_HEADS, DIM), generator=made) for _ in range(LAYERS)]
        self.queries = torch.randn((LAYERS, tokens, Q_HEADS, DIM), generator=made)
        pages = -(-tokens // PAGE_SIZE)
        self.v2p = np.zeros(40, dtype=np.int32)
        virtual = np.arange(20, 20 + pages)
        self.v2p[virtual] = np.random.default_rng(0).permutation(np.arange(1, POOL_PAGES))[:pages]
        self.request = Request("asked", 0, Asked("quest", 1.0, True, record=last))
        self.request.pages = virtual
        self.request.prompt_tokens = tokens
        self.table = torch.zeros((40, len(OBSERVED), 2, KV_HEADS, DIM))
        for slot, layer in enumerate(OBSERVED):
            by_page = self.keys[layer].unflatten(0, (POOL_PAGES, PAGE_SIZE))
            self.table[virtual, slot] = key_bounds(by_page[self.v2p[virtual].astype(np.int64)])
        layout = MhaLayout(self.keys, self.keys, PAGE_SIZE)
        self.recorder = Recorder(folder, OBSERVED, POSITIONS, layout, Q_HEADS, DIM**-0.5, self.table, 99)
        self.req = SimpleNamespace(
            rid="asked",
            origin_input_ids=list(range(tokens)),
            output_ids=[],
            finished=lambda: True,
            finished_reason=SimpleNamespace(to_json=lambda: {"type": "length"}),
        )
        self.request.text = text_of(self.req)

    def slots(self, stop: int) -> torch.Tensor:
        pages = torch.from_numpy(self.v2p[self.request.pages].astype(np.int64))
        return (pages[:, None] * PAGE_SIZE + torch.arange(PAGE_SIZE)).flatten()[:stop]

    def compute(self, first: int, stop: int, extend: bool = True, strangers: int = 0) -> None:
        """One forward pass of positions ``first`` to ``stop``, beside another request of ``strangers`` tokens."""
        other = Request("stranger", 1, Asked("quest", 1.0), new_tokens=9)
        requests, lengths, prefixes = [self.request], [stop], [first]
        if strangers:
            requests, lengths = [other, *requests], [strangers, *lengths]
            prefixes = [0 if extend else strangers - 1, *prefixes]
        kind = EXTEND if extend else DECODE
        step = Step(kind, tuple(requests), tuple(lengths), tuple(prefixes))
        self.recorder.begin_pass(step, self.v2p)
        noise = torch.full((strangers if extend else min(1, strangers), 1), 99.0)
        for layer in range(LAYERS):
            own = self.queries[layer, first:stop]
            self.recorder.observe(layer, torch.cat((noise[:, :, None].expand(-1, Q_HEADS, DIM), own)))
        self.recorder.end_pass()

    def close(self) -> None:
        self.recorder.close(self.request, is_complete(self.req), self.v2p)


def expected_mass(server: Server, start: int, tokens: int) -> torch.Tensor:
    """``[blocks, heads, pages]`` by the definition of attention, in float64."""
    blocks, pages = (tokens - start) // BLOCK, -(-tokens // PAGE_SIZE)
    mass = torch.zeros((blocks, LAYERS * Q_HEADS, pages), dtype=torch.float64)
    for layer in range(LAYERS):
        keys = server.keys[layer][server.slots(tokens)].double()
        for at in range(start, start + blocks * BLOCK):
            for head in range(Q_HEADS):
                logits = keys[: at + 1, head // (Q_HEADS // KV_HEADS)] @ server.queries[layer, at, head].double()
                share = (logits * DIM**-0.5).softmax(0)
                for page in range(at // PAGE_SIZE + 1):
                    place = (at - start) // BLOCK, layer * Q_HEADS + head, page
                    mass[place] = max(mass[place], share[page * PAGE_SIZE : (page + 1) * PAGE_SIZE].sum())
    return mass


@pytest.mark.parametrize(
    ("tokens", "last", "passes"),
    [
        pytest.param(200, 70, [(0, 200)], id="one pass"),
        pytest.param(200, 70, [(0, 128), (128, 140), (140, 200)], id="chunks, one within a page"),
        pytest.param(150, 500, [(0, 64), (64, 150)], id="all of it"),
        pytest.param(131, 40, [(0, 128), *((at, at + 1) for at in range(128, 131))], id="decode steps"),
    ],
)
def test_recording_equals_attention(
    tokens: int, last: int, passes: list[tuple[int, int]], tmp_path: pathlib.Path
) -> None:
    server = Server(tmp_path, tokens, last)
    for first, stop in passes:
        server.compute(first, stop, extend=stop - first > 1, strangers=7 * (first % 3))
    server.close()
    facts, tensors = read_recording(tmp_path / "asked.safetensors")
    start = max(0, tokens - last) // BLOCK * BLOCK
    assert (facts.tokens, facts.start, facts.first) == (tokens, start, max(0, start - RECORDED_POSITIONS))
    assert (facts.layers, facts.model_layers, facts.q_heads, facts.hidden_size) == (OBSERVED, LAYERS, Q_HEADS, 99)
    assert tensors["input_ids"].tolist() == list(range(tokens))
    mass = expected_mass(server, start, tokens)
    torch.testing.assert_close(tensors["mass"].double(), mass, atol=1e-3, rtol=0)
    queries = server.queries[list(OBSERVED), facts.first :].transpose(0, 1)
    torch.testing.assert_close(tensors["queries"], queries, rtol=0, atol=0)
    full = tokens // PAGE_SIZE
    keys = torch.stack([server.keys[layer][server.slots(full * PAGE_SIZE)] for layer in OBSERVED], dim=1)
    runs = keys.view(full, 32, 2, len(OBSERVED), KV_HEADS, DIM).mean(2)
    torch.testing.assert_close(tensors["runs"], runs, atol=1e-6, rtol=1e-6)


def test_scores_are_those_of_quest_at_each_anchor(tmp_path: pathlib.Path) -> None:
    server = Server(tmp_path, 260, 64)
    server.compute(0, 260)
    server.close()
    facts, tensors = read_recording(tmp_path / "asked.safetensors")
    for block in range(len(tensors["quest"])):
        at = facts.start + block * BLOCK
        recent = server.queries[list(OBSERVED), at - POSITIONS : at].transpose(0, 1)
        pages = torch.from_numpy(server.request.pages[: at // PAGE_SIZE])
        scores = bound_score_reference(recent, server.table, pages, DIM**-0.5)
        torch.testing.assert_close(tensors["quest"][block, : len(pages)].float(), scores, atol=1e-3, rtol=0)
        assert (tensors["quest"][block, len(pages) :] == 0).all()
    mean = tensors["mean_key"][0].float()
    assert mean.sum() > 0 and not torch.allclose(mean, tensors["quest"][0].float(), atol=1e-3)


def test_an_aborted_request_is_not_written(tmp_path: pathlib.Path) -> None:
    server = Server(tmp_path, 200, 70)
    server.compute(0, 128)
    server.req.finished_reason = SimpleNamespace(to_json=lambda: {"type": "abort"})
    server.close()
    assert list(tmp_path.iterdir()) == []
    assert server.recorder.documents == {}


def test_a_retracted_request_is_recorded_when_it_comes_back(tmp_path: pathlib.Path) -> None:
    server = Server(tmp_path, 200, 70)
    server.compute(0, 128)
    server.req.finished = lambda: False
    server.close()
    assert list(tmp_path.iterdir()) == []
    server.req.finished = lambda: True
    server.compute(0, 200)
    server.close()
    _, tensors = read_recording(tmp_path / "asked.safetensors", ("runs",))
    assert len(tensors["runs"]) == 3


def test_a_short_request_is_not_written(tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture) -> None:
    server = Server(tmp_path, 40, 10)
    server.compute(0, 40)
    server.close()
    assert list(tmp_path.iterdir()) == []
    assert "has only 40 tokens" in caplog.text


def test_requests_that_do_not_ask_are_not_recorded(tmp_path: pathlib.Path) -> None:
    server = Server(tmp_path, 200, 0)
    server.compute(0, 200)
    server.close()
    assert list(tmp_path.iterdir()) == []


# --- files -----------------------------------------------------------------------------------------------------------


def test_a_recording_appears_whole_or_not_at_all(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any, **options: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("sglang_lsa.indexer.recording.save_file", full)
    with pytest.raises(OSError, match="No space"):
        write_recording(tmp_path / "a.safetensors", {"mass": torch.zeros(1)}, {})
    assert not (tmp_path / "a.safetensors").exists()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ("missing", "cannot be read"),
        ("cut", "is damaged"),
        ("empty", "is damaged"),
        ("text", "is damaged"),
        ("other", "no recording of format"),
        ("nan", "are no numbers"),
        ("part", "is damaged"),
    ],
)
def test_bad_files_are_refused(damage: str, words: str, tmp_path: pathlib.Path) -> None:
    from safetensors.torch import save_file

    server = Server(tmp_path, 200, 70)
    server.compute(0, 200)
    server.close()
    path = tmp_path / "asked.safetensors"
    content = path.read_bytes()
    _, tensors = read_recording(path)
    if damage == "missing":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "text":
        path.write_text("not a recording" * 10)
    elif damage == "other":
        save_file(tensors, path)
    elif damage == "nan":
        write_recording(path, tensors | {"queries": tensors["queries"] * float("nan")}, FACTS)
    else:
        write_recording(path, {"mass": tensors["mass"]}, FACTS)
    with pytest.raises(BadRecording, match=words):
        read_recording(path)


FACTS = {
    "prompt_tokens": 200,
    "tokens": 200,
    "start": 128,
    "first": 104,
    "layers": [0, 2],
    "model_layers": 3,
    "hidden_size": 99,
    "q_heads": 4,
}
