"""FlashMemory's retriever against its formula written out in float64, on random checkpoints of both published sizes."""

from __future__ import annotations

import math
import pathlib
import pickle
from typing import Any

import pytest
import torch

from sglang_lsa.indexer.flashmemory import frequencies, hadamard, load_retrievers, rotate, score
from sglang_lsa.kernels.retriever_score import pack_keys, retriever_score, unpack_keys

HIDDEN = 4096
SIZES = [pytest.param(64, 1024, id="64 heads, rank 1024"), pytest.param(128, 2048, id="128 heads, rank 2048")]


def checkpoint(heads: int, rank: int, seed: int = 0, hidden: int = HIDDEN) -> dict[str, torch.Tensor]:
    made = torch.Generator().manual_seed(seed)
    return {
        "wq_a.weight": torch.randn((rank, hidden), generator=made) * hidden**-0.5,
        "wq_b.weight": torch.randn((heads * 128, rank), generator=made) * rank**-0.5,
        "q_norm_weight": torch.rand(rank, generator=made) + 0.5,
        "weights_proj.weight": torch.randn((heads, hidden), generator=made) * hidden**-0.5,
    }


def joint(layers: tuple[int, ...], heads: int, rank: int, hidden: int = HIDDEN) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = {}
    for layer in layers:
        state |= {f"retrievers.l{layer}.{name}": v for name, v in checkpoint(heads, rank, layer, hidden).items()}
        state[f"retrievers.l{layer}.freqs_cis"] = torch.zeros((4, 32), dtype=torch.complex64)
    return state


def by_the_formula(state: dict[str, torch.Tensor], x: torch.Tensor, position: int, packed: torch.Tensor) -> list[float]:
    """Logits of one token, with loops, complex numbers and a Hadamard matrix."""
    state = {name: value.double() for name, value in state.items()}
    x, heads = x.double(), len(state["weights_proj.weight"])
    low = state["wq_a.weight"] @ x
    low = low / (low.square().mean() + 1e-6).sqrt() * state["q_norm_weight"]
    q = (state["wq_b.weight"] @ low).view(heads, 128)
    turned = torch.view_as_complex(q[:, 64:].reshape(heads, 32, 2))
    # YaRN: pairs that turn more than 32 times in the original context stay, those that turn less than once are slowed.
    fast, slow = (64 * math.log(65536 / (times * 2 * math.pi)) / (2 * math.log(160000)) for times in (32, 1))
    for pair in range(32):
        plain = 160000 ** (-2 * pair / 64)
        part = min(1.0, max(0.0, (pair - math.floor(fast)) / (math.ceil(slow) - math.floor(fast))))
        angle = min(position, (1 << 20) - 1) * (plain / 16 * part + plain * (1 - part))
        turned[:, pair] *= complex(math.cos(angle), math.sin(angle))
    q = torch.cat((q[:, :64], torch.view_as_real(turned).flatten(1)), dim=1)
    matrix = torch.ones((1, 1), dtype=torch.float64)
    for _ in range(7):
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), matrix)
    q = q @ matrix * 128**-0.5
    weights = state["weights_proj.weight"] @ x * 128**-0.5 * heads**-0.5
    keys = packed[:, :128].contiguous().view(torch.float8_e4m3fn).double()
    keys *= packed[:, 128:].contiguous().view(torch.float32).double()
    return [float((weights * (q @ key).clamp(min=0)).sum()) for key in keys]


@pytest.mark.parametrize(("heads", "rank"), SIZES)
def test_scores_are_those_of_the_formula(heads: int, rank: int, tmp_path: pathlib.Path) -> None:
    layers = (10, 12)
    states = {layer: checkpoint(heads, rank, layer) for layer in layers}
    torch.save(joint(layers, heads, rank), tmp_path / "joint.pt")
    retrievers = load_retrievers(tmp_path / "joint.pt")
    assert list(retrievers) == list(layers) and all(r.heads == heads for r in retrievers.values())
    made = torch.Generator().manual_seed(1)
    hidden = {layer: torch.randn((2, HIDDEN), generator=made) for layer in layers}
    packed = {layer: pack_keys(torch.randn((9, 128), generator=made)) for layer in layers}
    positions = torch.tensor([70_001, (1 << 20) + 5])
    expected = torch.tensor(
        [
            [by_the_formula(states[layer], hidden[layer][i], int(at), packed[layer]) for layer in layers]
            for i, at in enumerate(positions)
        ],
        dtype=torch.float64,
    )
    exact = score(retrievers, {layer: value.double() for layer, value in hidden.items()}, positions, packed)
    torch.testing.assert_close(exact, expected.amax(dim=1).sigmoid(), atol=1e-9, rtol=0)
    usual = score(retrievers, hidden, positions, packed)
    torch.testing.assert_close(usual.double(), exact, atol=1e-4, rtol=0)


def test_a_checkpoint_of_one_layer(tmp_path: pathlib.Path) -> None:
    torch.save(checkpoint(4, 8, hidden=16), tmp_path / "one.pt")
    assert list(load_retrievers(tmp_path / "one.pt")) == [0]


def test_frequencies() -> None:
    radians = frequencies()
    assert radians[0] == 1.0, "fast pairs are left alone"
    assert float(radians[-1]) == pytest.approx(160000 ** (-62 / 64) / 16), "slow ones are slowed sixteenfold"
    assert (radians.diff() < 0).all()


def test_rotation_and_transform_keep_lengths() -> None:
    values = torch.randn((3, 5, 128), dtype=torch.float64)
    turned = rotate(values, torch.tensor([0, 7, 900_000]))
    torch.testing.assert_close(turned[0], values[0])
    torch.testing.assert_close(turned.norm(dim=-1), values.norm(dim=-1))
    torch.testing.assert_close(hadamard(hadamard(values)), values)


def test_packed_keys_keep_three_bits() -> None:
    keys = torch.randn((50, 128)) * torch.logspace(-3, 3, 50)[:, None]
    packed = pack_keys(keys)
    assert packed.shape == (50, 132) and packed.dtype == torch.uint8
    apart = (unpack_keys(packed) - keys).abs() / keys.abs().amax(dim=1, keepdim=True)
    assert apart.max() < 2**-4
    assert torch.isfinite(unpack_keys(pack_keys(torch.zeros((2, 128))))).all()


def test_nothing_to_score() -> None:
    assert retriever_score(torch.zeros((2, 4, 128)), torch.zeros((2, 4)), pack_keys(torch.zeros((0, 128)))).shape == (
        2,
        0,
    )


class Harmful:
    """Pickled code, which makes a file."""

    def __init__(self, path: pathlib.Path):
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return pathlib.Path.touch, (self.path,)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ("missing", "cannot be read"),
        ("text", "no checkpoint of tensors"),
        ("code", "no checkpoint of tensors"),
        ("list", "holds a list"),
        ("other", r"has no wq_a\.weight"),
        ("part", r"layer 10 has no weights_proj\.weight"),
        ("shape", "do not fit each other"),
        ("nan", "are no numbers"),
    ],
)
def test_bad_checkpoints_are_refused(damage: str, words: str, tmp_path: pathlib.Path) -> None:
    path, state = tmp_path / "c.pt", joint((10,), 4, 8, 16)
    if damage == "text":
        path.write_text("not a checkpoint")
    elif damage == "code":
        path.write_bytes(pickle.dumps(Harmful(tmp_path / "ran")))
    elif damage == "list":
        torch.save([1, 2], path)
    elif damage == "other":
        torch.save({"weight": torch.zeros(3)}, path)
    elif damage != "missing":
        if damage == "part":
            del state["retrievers.l10.weights_proj.weight"]
        elif damage == "shape":
            state["retrievers.l10.wq_b.weight"] = torch.zeros((4 * 64, 8))
        else:
            state["retrievers.l10.q_norm_weight"][0] = float("nan")
        torch.save(state, path)
    with pytest.raises(ValueError, match=words):
        load_retrievers(path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("shape", "dtype"), [((4, 128), torch.uint8), ((4, 132), torch.int8), ((132,), torch.uint8)], ids=str
)
def test_keys_of_another_layout_are_refused(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match="packed keys are"):
        retriever_score(torch.zeros((1, 4, 128)), torch.zeros((1, 4)), torch.zeros(shape, dtype=dtype))
