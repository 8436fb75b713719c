"""Draws which pages each request kept on the device, window by window."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sglang_lsa.config import PAGE_SIZE
from sglang_lsa.memory.pages import pages_spanned

NOT_RESIDENT, SINK, RECENT, CHOSEN, NOT_WRITTEN = range(5)
NAMES = {
    NOT_RESIDENT: "not resident (in the host mirror)",
    SINK: "sink (always kept)",
    RECENT: "recent (always kept)",
    CHOSEN: "chosen by the policy",
}
COLOURS = {NOT_RESIDENT: "#e9edf1", SINK: "#54606b", RECENT: "#8fa3b5", CHOSEN: "#1f77d0", NOT_WRITTEN: "#ffffff"}
FACT_COLOUR = "#d62728"
PICTURE = "picture"
"""Name of the phase whose requests are drawn."""


@dataclass(frozen=True)
class Panel:
    """One request of the picture.

    Args:
        title: printed above it.
        history: per window the resident positions below the tail, as in ``/lsa/requests``.
        context_tokens: tokens of the request when it ended.
        sink_pages, recent_pages: how many of a resident set were not the policy's choice, tail included.
        fact_pages: positions of the pages that hold the hidden fact.
    """

    title: str
    history: Sequence[Sequence[int]]
    context_tokens: int
    sink_pages: int
    recent_pages: int
    fact_pages: Sequence[int]


def draw_results(results: dict[str, Any], path: pathlib.Path) -> None:
    """The picture of a ``demo.json``."""
    budget, widen = results["config"]["budget"], results["config"].get("widen", 1)
    title = f"Pages that decode reads at a budget of {budget:.1%}: {results['model']}"
    title += f"\nUp to {widen:g} times as many while an answer repeats its prompt" if widen > 1 else ""
    draw(panels(results), title, path)


def panels(results: dict[str, Any]) -> list[Panel]:
    """One for each request of the last phase: the first question on each document, and then the first ones again."""
    config, phase = results["config"], results["phases"][-1]
    assert phase["name"] == PICTURE
    firsts = list({question["word"]: question for question in reversed(results["questions"])}.values())[::-1]
    drawn = []
    for number, (answer, request) in enumerate(zip(phase["answers"], phase["requests"], strict=True)):
        question, bound = firsts[number % len(firsts)], request["budget_pages"]
        drawn.append(
            Panel(
                title=f"{question['word']}, {request['policy']}: reads {request['resident_pages']} of "
                f"{request['context_pages']} pages; its answer is {'right' if answer['right'] else 'wrong'}",
                history=request["history"],
                context_tokens=request["context_tokens"],
                # As in sglang_lsa.engine.selection.
                sink_pages=min(config["sink_pages"], bound // 2),
                recent_pages=max(1, min(config["recent_pages"], bound // 4)),
                fact_pages=question["fact_pages"],
            )
        )
    return drawn


def residency_map(panel: Panel) -> np.ndarray:
    """What each page was in each window: int8 ``[windows, context pages]`` of the codes above.

    The tail, which every window reads, starts behind the last resident position and grows until the next window.
    """
    pages = pages_spanned(panel.context_tokens, PAGE_SIZE)
    grid = np.full((len(panel.history), pages), NOT_RESIDENT, dtype=np.int8)
    tails = [max(positions) + 1 if len(positions) else 0 for positions in panel.history]
    for window, (positions, tail) in enumerate(zip(panel.history, tails, strict=True)):
        if not tail:  # a dense window reads everything
            grid[window] = CHOSEN
            continue
        grid[window, list(positions)] = CHOSEN
        grid[window, : panel.sink_pages] = SINK
        end = tails[window + 1] + 1 if window + 1 < len(tails) else pages
        grid[window, tail - (panel.recent_pages - 1) : end] = RECENT
        grid[window, end:] = NOT_WRITTEN
    return grid


def draw(panels: Sequence[Panel], title: str, path: pathlib.Path) -> None:
    """Write the residency maps of ``panels`` below each other as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    colours = ListedColormap([COLOURS[code] for code in sorted(COLOURS)])
    widest = max(pages_spanned(panel.context_tokens, PAGE_SIZE) for panel in panels)
    heights = [max(2, len(panel.history)) for panel in panels]
    figure, rows = pyplot.subplots(
        len(panels),
        1,
        figsize=(12, 1.6 + sum(0.55 + 0.28 * height for height in heights)),
        gridspec_kw={"height_ratios": heights},
        sharex=True,
        squeeze=False,
        layout="constrained",
    )
    for axes, panel in zip(rows[:, 0], panels, strict=True):
        grid = residency_map(panel)
        windows, pages = grid.shape
        edges = np.arange(pages + 1), np.arange(windows + 1) - 0.5
        axes.pcolormesh(*edges, grid, cmap=colours, vmin=0, vmax=len(COLOURS) - 1, edgecolor="white", linewidth=0.6)
        axes.set_title(panel.title, loc="left", fontsize=10)
        axes.set_ylabel("window")
        axes.set_yticks(range(windows))
        axes.set_ylim(windows - 0.5, -0.5)
        axes.set_xlim(0, widest)
        axes.spines[["top", "right"]].set_visible(False)
        first, last = min(panel.fact_pages), max(panel.fact_pages) + 1
        axes.plot(
            [first, last, last, first, first],
            [-0.5, -0.5, windows - 0.5, windows - 0.5, -0.5],
            color=FACT_COLOUR,
            linewidth=1.8,
            clip_on=False,
            zorder=3,
        )
    rows[-1, 0].set_xlabel("page position in the request (1 page = 64 tokens)")
    legend = [
        Patch(facecolor=COLOURS[code], edgecolor="#b8c0c8", label=NAMES[code])
        for code in (CHOSEN, SINK, RECENT, NOT_RESIDENT)
    ]
    legend.append(Patch(facecolor="none", edgecolor=FACT_COLOUR, linewidth=1.8, label="page of the hidden fact"))
    figure.legend(handles=legend, loc="outside lower center", ncols=len(legend), fontsize=9, frameon=False)
    figure.suptitle(title, fontsize=12, fontweight="bold")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
