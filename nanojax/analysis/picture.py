"""A step as a picture: when each group ran, what it took in all, and the longest kernels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from nanojax.analysis.profile import GROUPS, IDLE, Profile
from nanojax.errors import StorageError

COLOURS = ("#3b6fb6", "#d9822b", "#7a9e3d", "#a05195", "#c94f5b", "#2fa4a9", "#8c7a5b", "#b0b0b0", "#555555", "#e4e4e4")
BINS, LONGEST = 300, 14


def draw(profile: Profile, target: Path, title: str) -> str:
    """Returns where the picture is, or what is missing where there is no matplotlib. Raises StorageError where it cannot be written."""
    try:
        import matplotlib
    except ImportError:
        return "no picture: matplotlib is not installed; pip install 'nanojax[viz]'"
    matplotlib.use("agg")
    from matplotlib import pyplot

    colours = dict(zip(GROUPS, COLOURS, strict=True))
    present = [group for group in GROUPS if profile.seconds(group) > 0]
    figure, (top, middle, low) = pyplot.subplots(3, 1, figsize=(11, 9.5), layout="constrained", height_ratios=(1.1, 2.2, 4))
    edges = np.linspace(0, profile.wall, BINS + 1)
    below = np.zeros(BINS)
    for group in present:
        share = _shares([(start, end) for start, end, name in profile.spans if name == group], edges)
        share = np.minimum(share, 1 - below)  # what ran beside something else
        top.fill_between(1e3 * edges[:-1], below, below + share, color=colours[group], linewidth=0, step="post")
        below += share
    top.set(xlabel="ms, one step", ylabel="share of the time", xlim=(0, 1e3 * profile.wall), ylim=(0, 1), title=title)
    _bars(middle, present, [profile.seconds(group) for group in present], profile.wall, [colours[group] for group in present])
    kernels = [row for row in profile.by("name").values() if row.group != IDLE][:LONGEST]
    labels = [f"{row.name[:58]}  x {row.count:,.0f}" for row in kernels]
    _bars(low, labels, [row.seconds for row in kernels], profile.wall, [colours[row.group] for row in kernels])
    low.set(xlabel="ms a step")
    try:
        figure.savefig(target, dpi=110)
    except OSError as error:
        raise StorageError(f"cannot write {target}: {error.strerror}; name another place with --picture") from error
    finally:
        pyplot.close(figure)
    return str(target)


def _shares(spans: Sequence[tuple[float, float]], edges: np.ndarray) -> np.ndarray:
    """How much of each bin the spans cover."""
    starts, ends = np.array(spans).reshape(-1, 2).T

    def covered(t: np.ndarray) -> np.ndarray:
        return np.array([np.clip(x - starts, 0, ends - starts).sum() for x in t])

    return np.diff(covered(edges)) / np.diff(edges)


def _bars(axes, labels: Sequence[str], seconds: Sequence[float], wall: float, colours: Sequence[str]) -> None:
    places = range(len(labels))
    axes.barh(places, [1e3 * s for s in seconds], color=colours)
    axes.set_yticks(places, labels, fontsize=8)
    axes.invert_yaxis()
    for place, s in zip(places, seconds, strict=True):
        axes.text(1e3 * s, place, f" {1e3 * s:.1f} ms, {s / wall:.1%}", va="center", fontsize=8)
    axes.margins(x=0.16)
    axes.spines[["top", "right"]].set_visible(False)
