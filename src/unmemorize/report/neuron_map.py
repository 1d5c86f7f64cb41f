"""Where the chosen neurons are: one strip a site, as long as the site is wide, stronger where more prompts need it.

A tick is never thinner than can be seen, so in a wide site neighbours may touch; the table has the numbers. Nothing is
computed here but counts. Source: ours.
"""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from unmemorize.records import NeuronAudit, PictureAudit, SiteNeurons
from unmemorize.report import plots, rows
from unmemorize.report.measures import Cell
from unmemorize.report.page import Plot
from unmemorize.report.plots import number, tag
from unmemorize.report.rows import RowLayout, Rows
from unmemorize.report.tables import Column, Row, Table

MAX_STRIPS = 24
MAX_NEURON_PX = 14.0
MIN_TICK_PX = 2.2
NUM_SHADES = 4
MAX_NAMED = 8


def short_paths(paths: Sequence[str]) -> list[str]:
    """Module paths without what they all begin and end with; a name never begins with the number of a block."""
    split = [path.split(".") for path in paths]
    if len(set(paths)) < 2:
        return list(paths)
    first = last = 0
    shortest = min(map(len, split))
    while first < shortest - 1 and len({parts[first] for parts in split}) == 1:
        first += 1
    while first and any(parts[first].isdigit() for parts in split):
        first -= 1
    while last < shortest - first - 1 and len({parts[-1 - last] for parts in split}) == 1:
        last += 1
    return [".".join(parts[first : len(parts) - last]) for parts in split]


def neuron_plot(audit: PictureAudit | NeuronAudit, ident: str) -> Plot | None:
    """The map of chosen neurons over all sites; None when no site is recorded or no neuron chosen."""
    names = short_paths([site.path for site in audit.sites])
    sites = [(name, site) for name, site in zip(names, audit.sites, strict=True) if site.width > 0]
    if not any(site.indices for _, site in sites):
        return None
    shown = sites
    if len(sites) > MAX_STRIPS:
        shown = [(name, site) for name, site in sites if site.indices]
        shown = shown[:MAX_STRIPS]
    pictures = tuple(
        _map_picture(shown, layout, f"{ident}-{place}")
        for place, layout in enumerate((rows.WIDE, rows.NARROW))
    )
    chosen, width = (
        sum(len(site.indices) for site in audit.sites),
        sum(site.width for site in audit.sites),
    )
    notes = [
        f"{chosen:,} of {width:,} neurons at {len(audit.sites)} sites; a strip is as long as its site is wide."
    ]
    most = max((count for site in audit.sites for count in site.num_prompts), default=0)
    if most > 1:
        notes.append(f"The stronger a tick, the more prompts it was found for, from 1 to {most}.")
    if len(shown) < len(sites):
        notes.append(f"{len(sites) - len(shown)} more sites are in the table only.")
    return Plot(pictures=pictures, note=" ".join(notes))


def _map_picture(sites: Sequence[tuple[str, SiteNeurons]], layout: RowLayout, ident: str) -> Markup:
    widest = max(site.width for _, site in sites)
    room = 0.0 if layout.is_narrow else 96.0
    left = layout.label_width or 8
    scale_px = min((layout.width - left - layout.right - room) / widest, MAX_NEURON_PX)
    layout = layout._replace(right=layout.width - left - widest * scale_px)
    counts = tuple(f"{len(site.indices):,} of {site.width:,}" for _, site in sites)
    chart = Rows(
        layout=layout,
        labels=tuple(name for name, _ in sites),
        notes=counts if layout.is_narrow else ("",) * len(sites),
        row_height=18 if layout.is_narrow else 28,
        low=0.0,
        high=float(widest),
        top=6.0,
    )
    most = max((count for _, site in sites for count in site.num_prompts), default=0)

    def marks(row: int) -> Markup:
        return _strip(sites[row][1], chart, row, most, "" if layout.is_narrow else counts[row])

    return rows.draw(
        chart,
        marks,
        ident=ident,
        title="Chosen neurons by site",
        description="; ".join(f"{name}: {count}" for (name, _), count in zip(sites, counts, strict=True)),
    )


def _strip(site: SiteNeurons, chart: Rows, row: int, most: int, count: str) -> Markup:
    box, scale = chart.box(row), chart.scale
    top, bottom = box.top + 4, box.bottom - 4
    parts = [
        tag("title", f"{site.path}: {frequent(site, 30) or 'no neuron chosen'}"),
        tag(
            "rect", x=box.left, y=top, width=scale(site.width) - box.left, height=bottom - top, class_="site"
        ),
    ]
    shades: dict[int, list[int]] = {}
    for index, prompts in zip(site.indices, _prompts(site), strict=True):
        if 0 <= index < site.width:
            shades.setdefault(_shade(prompts, most), []).append(index)
    per_neuron = scale(1) - scale(0)
    tick = max(MIN_TICK_PX, per_neuron * 0.86)
    for shade in sorted(shades):
        path = "".join(
            f"M{number(scale(index + 0.5))} {number(top)}V{number(bottom)}" for index in sorted(shades[shade])
        )
        parts.append(tag("path", d=path, stroke_width=tick, class_=f"neuron shade{shade}"))
    if count:
        y = (top + bottom) / 2 + chart.layout.font * 0.35
        parts.append(tag("text", count, x=scale(site.width) + 10, y=y, class_="note"))
    return tag("g", plots.join(parts))


def _prompts(site: SiteNeurons) -> list[int]:
    """How many prompts each neuron was found for; 0 where that is not known."""
    return [*site.num_prompts, *([0] * len(site.indices))][: len(site.indices)]


def _shade(prompts: int, most: int) -> int:
    """1 (few prompts) to NUM_SHADES (as many as any neuron); the darkest where counts are not known."""
    if prompts <= 0 or most <= 1:
        return NUM_SHADES
    return 1 + (prompts - 1) * (NUM_SHADES - 1) // (most - 1)


def frequent(site: SiteNeurons, limit: int) -> str:
    """The site's chosen neurons, most prompts first, with their number of prompts where known."""
    ranked = sorted(zip(site.indices, _prompts(site), strict=True), key=lambda pair: (-pair[1], pair[0]))
    texts = [
        f"{index} ({count}\N{MULTIPLICATION SIGN})" if count else str(index)
        for index, count in ranked[:limit]
    ]
    more = f" and {len(ranked) - limit:,} more" if len(ranked) > limit else ""
    return ", ".join(texts) + more


def neuron_table(audit: PictureAudit | NeuronAudit, ident: str) -> Table | None:
    """Chosen neurons by site; None when no site is recorded."""
    if not audit.sites:
        return None
    names = short_paths([site.path for site in audit.sites])
    rows_ = [
        Row(
            name=name,
            hint="" if name == site.path else site.path,
            cells=(
                Cell(text=f"{site.width:,}", value=site.width),
                Cell(text=f"{len(site.indices):,}", value=len(site.indices)),
                Cell(text=frequent(site, MAX_NAMED), value=frequent(site, len(site.indices))),
            ),
        )
        for name, site in zip(names, audit.sites, strict=True)
    ]
    has_counts = any(count for site in audit.sites for count in site.num_prompts)
    return Table(
        ident=ident,
        caption="Chosen neurons by site",
        columns=(
            Column(name="Site", is_number=False),
            Column(name="Width"),
            Column(name="Chosen"),
            Column(name="Neurons", hint="with the number of prompts" if has_counts else "", is_number=False),
        ),
        rows=tuple(rows_),
        is_sortable=len(rows_) > 1,
        shown_rows=50,
    )
