"""The report for people: a table of figures, one of limits, and a plot of shares."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from aegis_cluster.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

    from aegis_cluster.bench.figures import Figure
    from aegis_cluster.bench.machine import Limit
    from aegis_cluster.bench.run import Report


def table(report: Report) -> list[str]:
    """Lines of Markdown: they read well on a screen and go into a document as they are."""
    machine = report.machine
    return [
        f"{machine['processor']}, {machine['cores']} cores, Linux {machine['kernel']}, Python"
        f" {machine['python']}, commit {machine['commit']}, {machine['at']} UTC, load"
        f" {machine['load']} at the start; runs of {report.plan.seconds:g} s, median of"
        f" {report.plan.repeats} (smallest..largest), topics of {report.plan.partitions}"
        " partitions.",
        "",
        *_markdown(_FIGURE_HEADS, [_figure_row(figure) for figure in report.figures]),
        "",
        *_extras(report.figures),
        *_markdown(("limit of this machine", "figure"), [_limit_row(one) for one in report.limits]),
    ]


_FIGURE_HEADS = (
    "scenario", "durability", "figure", "of its limit", "must / aim", "reached",
    "processor, µs a record: client + nodes",
)  # fmt: skip


def _figure_row(figure: Figure) -> tuple[str, ...]:
    unit = figure.unit
    spread = f"{_number(figure.least)}..{_number(figure.most)}"
    goal = "" if figure.must is None else _number(figure.must)
    if figure.aim is not None:
        goal += f" / {_number(figure.aim)}"
    return (
        figure.title,
        figure.durability,
        f"**{_number(figure.median)}** {unit} ({spread})",
        "" if figure.share is None else f"{figure.share:.0%} of {figure.limit_name}",
        goal,
        figure.reached,
        f"{figure.client_us:.2f} + {figure.nodes_us:.2f}",
    )


def _extras(figures: list[Figure]) -> list[str]:
    lines = {
        f"{figure.title}: "
        + ", ".join(f"{name} {_number(value)}" for name, value in figure.extra.items()): None
        for figure in figures
        if figure.extra
    }
    return [*lines, ""] if lines else []


def _limit_row(limit: Limit) -> tuple[str, ...]:
    return f"{limit.name}: {limit.title}", f"{_number(limit.value)} {limit.unit}"


def _number(value: float) -> str:
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _markdown(heads: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    lines = [heads, tuple("---" for _ in heads), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


def plot(report: Report, path: Path) -> None:
    """Every figure as a share of its limit. Raises `ConfigError` where matplotlib is missing."""
    try:
        import matplotlib as library
    except ImportError:
        raise ConfigError(
            "The plot needs matplotlib; install it with 'pip install aegis-cluster[bench]'."
        ) from None
    library.use("Agg")
    from matplotlib import pyplot

    shown = [(f, f.share * 100) for f in report.figures if f.share is not None]
    figures = [f for f, _ in shown]
    names = [f"{f.title}\n{f.unit}, {f.durability}" for f in figures]
    shares = [share for _, share in shown]
    drawing: Any = pyplot.subplots(figsize=(9, 1 + 0.6 * len(names)), layout="constrained")
    figure, axes = drawing
    bars = axes.barh(names, shares, color=[_COLOURS[f.reached] for f in figures])
    axes.bar_label(bars, [f" {_number(f.median)} {f.unit}" for f in figures], fontsize=8)
    axes.invert_yaxis()
    axes.axvline(100, color="grey", linewidth=1)
    axes.set_xlabel("% of this machine's limit, measured in the same run")
    axes.set_title(f"Aegis Cluster {report.machine['commit']}, {report.machine['at']} UTC")
    axes.tick_params(axis="y", labelsize=8)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


_COLOURS = {"aim": "#2a7f62", "must": "#6fa8dc", "below": "#d9822b", "": "#999999"}
