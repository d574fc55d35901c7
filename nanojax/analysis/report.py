"""Tables of a profile, for a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from nanojax.analysis.profile import GROUPS, Profile, Row
from nanojax.analysis.record import About

WIDEST = 64  # characters of a kernel's name


def report(profile: Profile, about: About | None, top: int) -> str:
    """All tables: groups, model parts, the `top` longest kernels, and counts of FLOPs and bytes."""
    groups = [profile.by("group")[group] for group in GROUPS if group in profile.by("group")]
    parts = [row for key, row in profile.by("part").items() if key]
    kernels = list(profile.by("name").values())
    sections = [
        "\n".join([heading("group"), *(line(row.name, row, profile) for row in groups), *last_lines(profile)]),
        "" if not parts else "\n".join([heading("model part"), *(line(row.name, row, profile) for row in parts)]),
        "\n".join([heading("kernel"), *(line(shortened(row.name), row, profile) for row in kernels[:top])]),
        counts(profile, about),
    ]
    if about is None:
        sections.append("The trace says nothing of the program: kernels are grouped by their names, and FLOPs and bytes are not known.")
    return "\n\n".join(filter(None, sections))


def heading(word: str) -> str:
    """The line above rows, `word` above their names."""
    return f"{word:<{WIDEST}}{'ms':>9}{'share':>8}{'kernels':>9}{'TFLOP/s':>9}{'GB/s':>7}"


def line(name: str, row: Row, profile: Profile) -> str:
    """A row, with what it reached where its FLOPs and bytes are known."""
    tflops = f"{row.flops / row.seconds / 1e12:9.3g}" if row.flops and row.seconds else f"{'':9}"
    gbytes = f"{row.bytes / row.seconds / 1e9:7.4g}" if row.bytes and row.seconds else f"{'':7}"
    return f"{name:<{WIDEST}}{1e3 * row.seconds:9.2f}{row.seconds / profile.wall:8.1%}{row.count:9,.0f}{tflops}{gbytes}".rstrip()


def last_lines(profile: Profile) -> list[str]:
    """What makes the groups whole, the sum, and what lies beneath."""
    return [
        f"{'idle':<{WIDEST}}{1e3 * profile.idle:9.2f}{profile.idle / profile.wall:8.1%}",
        f"{'a step':<{WIDEST}}{1e3 * profile.wall:9.2f}{1:8.0%}",
        f"{'hidden under other kernels: communication and copies':<{WIDEST}}{1e3 * profile.hidden:9.2f}",
    ]


def counts(profile: Profile, about: About | None) -> str:
    """FLOPs and bytes of a step: by formula, by XLA, by what ran."""
    if about is None:
        return ""
    flops, size = sum(row.flops for row in profile.rows), sum(row.bytes for row in profile.rows)
    own = about.flops / about.devices
    lines = [
        f"FLOPs of a device and step: {own:.4g} by formula (attention to all keys), {flops:.4g} in what ran (attention to those before)"
        + (f", {about.xla_flops:.4g} by XLA (a loop's body once)" if about.xla_flops else ""),
        f"bytes: {size:.4g} in what ran, if every operand came from memory"
        + (f", {about.xla_bytes:.4g} by XLA (a loop's body once)" if about.xla_bytes else ""),
        f"{about.tokens / profile.wall:,.0f} tokens/s"
        + (f", {about.flops / profile.wall / about.peak_flops:.1%} MFU" if about.peak_flops else "")
        + f"; {about.devices} x {about.device}",
    ]
    return "\n".join(lines)


def shortened(name: str) -> str:
    """A name that fits its column."""
    return name if len(name) < WIDEST else name[: WIDEST - 4] + "..."


def comparison(a: Profile, b: Profile, names: Sequence[str], top: int) -> str:
    """What takes longer in `b` than in `a`, and what shorter."""
    head = f"{'':<{WIDEST}}{names[0][-14:]:>15}{names[1][-14:]:>15}{'change, ms':>12}"
    groups = [(group, a.seconds(group), b.seconds(group)) for group in GROUPS]
    total = [("a step", a.wall, b.wall)]
    rows = [head, *(changed(*row) for row in groups if row[1] or row[2]), *(changed(*row) for row in total)]
    tables = ["\n".join(rows)]
    for field, title in (("part", "model part"), ("name", "kernel")):
        one, two = a.by(field), b.by(field)
        both = [(key, seconds(one, key), seconds(two, key)) for key in {**one, **two} if key]
        both.sort(key=lambda row: -abs(row[2] - row[1]))
        if both:
            tables.append("\n".join([f"{title}, largest changes first", *(changed(shortened(key), x, y) for key, x, y in both[:top])]))
    return "\n\n".join(tables)


def seconds(rows: dict[str, Row], key: str) -> float:
    """Of a row that may not be there."""
    return rows[key].seconds if key in rows else 0.0


def changed(name: str, before: float, after: float) -> str:
    """A row of a comparison; times in seconds."""
    return f"{name:<{WIDEST}}{1e3 * before:15.2f}{1e3 * after:15.2f}{1e3 * (after - before):+12.2f}"


def table(rows: Iterable[tuple[str, str]]) -> str:
    """Names and texts, one a line."""
    return "\n".join(f"{name:>22}  {text}" for name, text in rows)
