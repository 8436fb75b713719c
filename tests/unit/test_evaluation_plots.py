"""The picture of the divergence from full attention against memory, and which pictures ``sglang-lsa eval`` draws."""

from __future__ import annotations

import itertools
import pathlib
from typing import Any

import figures
import pytest
from PIL import Image, ImageChops

from sglang_lsa.evaluation.plots import arm_name, colors, draw, kl_panels, plot_kl
from sglang_lsa.evaluation.summary import AVERAGE, summarise

FOOTPRINTS = {"full": 1.0, "lsa 20%": 0.22, "lsa 10%": 0.12, "quest 10%": 0.11}


def answers(task: str, kl: dict[str, float | None], score: float | None = 1.0, length: int = 4096) -> list[dict]:
    """Two samples of every arm; the second is twice as far from full attention."""
    return [
        {
            "model": "some/m",
            "suite": "s",
            "task": task,
            "length": length,
            "sample": f"{task}-{number}",
            "turn": 0,
            "label": label,
            "arm": label.split()[0],
            "budget": float((label.split()[1:] or ["100%"])[0].rstrip("%")) / 100,
            "score": score,
            "footprint": FOOTPRINTS[label],
            "depth": 0.5,
            "averaged": True,
            "kl": None if far is None else far * (1 + number),
        }
        for (label, far), number in itertools.product(kl.items(), range(2))
    ]


def far(times: float = 1.0) -> dict[str, float | None]:
    return {"full": 0.0, "lsa 20%": 0.1 * times, "lsa 10%": 0.2 * times, "quest 10%": 0.4 * times}


def nothing() -> dict[str, float | None]:
    return dict.fromkeys(FOOTPRINTS)


def points_of(rows: list[dict[str, Any]], arm: str) -> list[tuple[float, ...]]:
    own = sorted((row for row in rows if row["arm"] == arm), key=lambda row: row["footprint"])
    return [(100 * row["footprint"], row["kl"], row["kl_ci_low"], row["kl_ci_high"]) for row in own]


def test_points_are_the_averages_of_the_summary() -> None:
    """Tasks that do not count in averages of accuracy do not here."""
    found = summarise([*answers("a", far()), *answers("b", far(3)), *answers("hard", far(9), score=0.0)])
    (panel,) = kl_panels(found, "some/m")
    averages = [row for row in found if row["task"] == AVERAGE and row["suite"] == "all"]
    assert panel.title == "average of tasks, 4,096 tokens" and panel.full == 0.0
    assert panel.arms == {arm: points_of(averages, arm) for arm in ("quest", "lsa")}
    assert [point[:2] for point in panel.arms["lsa"]] == [(12.0, pytest.approx(0.6)), (22.0, pytest.approx(0.3))]
    assert all(low < kl < high for own in panel.arms.values() for _, kl, low, high in own)
    assert kl_panels(found, "other") == []


def test_tasks_without_right_answers_have_panels_of_their_own() -> None:
    rows = [*answers("a", far()), *answers("a", nothing(), length=8192)]
    rows += [row for length in (8192, 4096) for row in answers("meeting", far(5), score=None, length=length)]
    panels = kl_panels(summarise(rows), "some/m")
    assert [panel.title for panel in panels] == [
        "average of tasks, 4,096 tokens",
        "s meeting, 4,096 tokens",
        "s meeting, 8,192 tokens",
    ]
    assert panels[1].arms["quest"][0][1] == pytest.approx(3.0)
    alone = [row for row in rows if row["task"] == "meeting"]
    assert kl_panels(summarise(alone), "some/m") == panels[1:]


def test_where_no_task_counts_each_is_drawn() -> None:
    found = summarise([*answers("a", far(), score=0.0), *answers("b", far(2), score=0.0)])
    assert [panel.title for panel in kl_panels(found, "some/m")] == ["s a, 4,096 tokens", "s b, 4,096 tokens"]


def test_pictures_that_there_is_something_for(tmp_path: pathlib.Path) -> None:
    names = {"quality-some-m.png", "depth-some-m.png"}
    for folder, far_away, more in (("without", nothing(), set()), ("with", far(), {"kl-some-m.png"})):
        (tmp_path / folder).mkdir()
        rows = answers("a", far_away)
        draw(tmp_path / folder, summarise(rows), rows, "some/m")
        assert {path.name for path in (tmp_path / folder).iterdir()} == names | more
    assert not plot_kl(tmp_path / "none.png", [], "some/m")
    only_full = [row for row in answers("a", far()) if row["arm"] == "full"]
    assert not plot_kl(tmp_path / "none.png", summarise(only_full), "some/m")
    assert not (tmp_path / "none.png").exists()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("times", [0.0, 1e-6, 1.0, 10.0])
def test_any_divergence_can_be_drawn(tmp_path: pathlib.Path, times: float) -> None:
    """Also 0, which has no logarithm, six orders of magnitude, and more panels than stand side by side."""
    rows = answers("meeting", {**far(times), "lsa 20%": 0.0}, score=None)
    rows += [row for task in "abcd" for row in answers(task, far(), score=0.0, length=8192) if times]
    assert plot_kl(tmp_path / "a.png", summarise(rows), "some/m")
    with Image.open(tmp_path / "a.png") as image:
        assert image.format == "PNG"


def test_a_picture_shows_its_points(tmp_path: pathlib.Path) -> None:
    pictures = []
    for name, times in (("a", 1.0), ("b", 1.5), ("c", 1.0)):
        kl = {**far(), "quest 10%": 0.4 * times}
        assert plot_kl(tmp_path / f"{name}.png", summarise(answers("t", kl)), "some/m")
        pictures.append(Image.open(tmp_path / f"{name}.png").convert("RGB"))
    one, other, same = pictures
    assert ImageChops.difference(one, same).getbbox() is None
    assert one.size != other.size or ImageChops.difference(one, other).getbbox() is not None


def test_an_arm_has_one_color_in_every_picture() -> None:
    """That of the order in averages, which the picture of accuracy shows, whatever has a divergence."""
    found = summarise([*answers("a", nothing()), *answers("meeting", {"quest 10%": 0.1, "full": 0.0}, score=None)])
    assert colors(found, "some/m") == {"lsa": "C0", "quest": "C1"}
    larger = figures.rows_of("quality-1.5b.json")
    model = figures.quality_larger_tables.MODEL
    both = colors(larger + figures.rows_of("quality-1.5b-curve.json"), model)
    assert list(colors(larger, model).items())[:3] == [("lsa", "C0"), ("quest", "C1"), ("lsa_auto", "C2")]
    assert both.items() >= {"lsa": "C0", "quest": "C1", "lsa_auto": "C2"}.items() and both["lsa_calibrated"] == "C3"


def test_published_points_are_those_of_the_table() -> None:
    larger = figures.rows_of("quality-1.5b.json") + figures.rows_of("quality-1.5b-curve.json")
    first, *meetings = kl_panels(larger, figures.quality_larger_tables.MODEL)
    averages = [r for r in figures.rows_of("quality-1.5b-curve.json") if r["task"] == AVERAGE and r["suite"] == "all"]
    arms = ("lsa", "lsa_auto", "lsa_calibrated", "quest", "window")
    assert first.arms == {arm: points_of(averages, arm) for arm in arms}
    assert {arm: len(own) for arm, own in first.arms.items()} == dict.fromkeys(arms, 3) | {"lsa_auto": 1}
    assert [panel.title for panel in meetings] == ["qmsum meeting, 16,384 tokens", "qmsum meeting, 32,000 tokens"]
    assert all(set(panel.arms) == {"lsa", "quest", "window"} for panel in meetings)


@pytest.mark.parametrize(
    ("arm", "name"),
    [
        ("full", "full attention"),
        ("lsa", "trained indexer"),
        ("lsa_auto", "trained indexer, auto"),
        ("lsa_calibrated", "calibrated"),
        ("quest", "Quest"),
        ("quest_apart", "Quest, apart"),
        ("lsa_first_apart", "trained indexer, first, apart"),
        ("window", "window"),
        ("recency", "last pages"),
        ("my_server", "my_server"),
    ],
)
def test_arms_are_named_as_people_read_them(arm: str, name: str) -> None:
    assert arm_name(arm) == name
