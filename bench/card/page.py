"""The page: one section a run, its targets first."""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape

from bench.card import draw
from bench.card.read import US, Cell, Run

_LINEAR = r"(?:linear )?(\w+?)(?:_fwd)?[- ]m(\d+)(?:[- ](\d+x\d+))?(?:-\w+)?"


def page(runs: Sequence[Run]) -> str:
    """The whole report; it loads nothing from anywhere.

    Args:
        runs: at least one.
    """
    links = "".join(
        f'<li><a href="#run{i}">{escape(run.machine)}</a>, {escape(run.date)}: {_score(run)}</li>'
        for i, run in enumerate(runs)
    )
    head = (
        "<header><h1>peftkern, measured</h1><p>Each section is one machine at one commit. "
        "Contenders took turns in one process; ratios are of medians. Figures of different "
        f"machines are never compared. What we lose is here too.</p><ul>{links}</ul></header>"
    )
    body = "".join(_section(i, run) for i, run in enumerate(runs))
    return (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>peftkern, measured</title><style>{_STYLE}</style></head>"
        f"<body><main>{head}{body}</main></body></html>\n"
    )


def crossovers(run: Run) -> list[tuple[str, list[draw.Series]]]:
    """Time of a product by its number of rows, for each format and shape with three or more."""
    groups: dict[str, list[tuple[int, Cell]]] = {}
    for match, cell in run.named(_LINEAR):
        groups.setdefault(f"{match[1]} {match[3] or ''}".strip(), []).append((int(match[2]), cell))
    found = []
    for title, cells in groups.items():
        cells.sort(key=lambda pair: pair[0])
        if len(cells) < 3:
            continue
        names = list(dict.fromkeys(name for _, cell in cells for name in cell.seconds))
        series = [
            draw.Series(
                name,
                tuple(
                    (m, cell.seconds[name] * 1e6, f"{m} rows, {_time(cell.seconds[name])}")
                    for m, cell in cells
                    if name in cell.seconds
                ),
            )
            for name in names
        ]
        found.append((title, series))
    return found


def against_peers(run: Run, peers: Sequence[str] | None = None) -> list[tuple[str, str, float]]:
    """Cell, peer, and how many times faster we are, in the order of the file."""
    found = []
    for cell in run.cells:
        for peer in cell.seconds:
            ratio = cell.faster_than(peer)
            if ratio is not None and (peers is None or peer in peers):
                found.append((cell.name, peer, ratio))
    return found


def _section(index: int, run: Run) -> str:
    facts = {"date": run.date, "commit": run.commit, **run.facts}
    listed = "".join(
        f"<div><dt>{escape(k)}</dt> <dd>{escape(v)}</dd></div>" for k, v in facts.items()
    )
    ceiling = ""
    if run.bytes_per_s:
        ceiling = (
            f"<p>Ceilings measured in the same run: {draw.human(run.bytes_per_s)}B/s of memory, "
            f"{draw.human(run.flop_per_s)}FLOP/s.</p>"
        )
    figures = "".join([*_rooflines(run), *_curves(run), *_peers(run), *_shares(run), *_peaks(run)])
    notes = "".join(f"<li>{escape(note)}</li>" for note in run.notes)
    return (
        f'<section id="run{index}"><h2>{escape(run.machine)}</h2><dl>{listed}</dl>{ceiling}'
        f"<h3>Targets: {_score(run)}</h3>{_targets(run)}"
        f'<div class="charts">{figures}</div><ul class="notes">{notes}</ul></section>'
    )


def _score(run: Run) -> str:
    met = sum(1 for v in run.verdicts if v.met)
    missed = sum(1 for v in run.verdicts if v.met is False)
    return f"{met} met, {missed} missed, {len(run.verdicts) - met - missed} not measured"


def _targets(run: Run) -> str:
    lines = []
    for v in run.verdicts:
        kind = "none" if v.met is None else "met" if v.met else "missed"
        said = "" if v.met is None else kind
        lines.append(
            f"<tr><td>{escape(v.what)}</td><td>{escape(v.promised)}</td>"
            f'<td>{escape(v.measured)}</td><td class="{kind}">{said}</td></tr>'
        )
    return (
        '<div class="wide"><table><thead><tr><th>target</th><th>promised</th><th>measured</th>'
        f"<th></th></tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
    )


def _rooflines(run: Run) -> list[str]:
    cells = [cell for cell in run.cells if cell.flops and cell.traffic and US in cell.seconds]
    if len(cells) < 2 or not run.bytes_per_s:
        return []
    names = list(dict.fromkeys(name for cell in cells for name in cell.seconds))
    series = [
        draw.Series(
            name,
            tuple(
                (
                    cell.flops / cell.traffic,
                    cell.flops / cell.seconds[name],
                    f"{cell.name}, {_time(cell.seconds[name])}",
                )
                for cell in cells
                if name in cell.seconds
            ),
        )
        for name in reversed(names)  # ours are drawn last, on top
    ]
    picture = draw.log_plot(
        series,
        "operations for each byte that must move",
        "FLOP/s",
        joined=False,
        roof=lambda x: min(run.flop_per_s, x * run.bytes_per_s),
    )
    note = (
        "Dashed: the ceilings of this run. A cell stands at the bytes of its quantized weight for "
        "every contender; a dense weight moves more. Hover for names."
    )
    return [_figure("Roofline", picture, note)]


def _curves(run: Run) -> list[str]:
    made = []
    for title, series in crossovers(run):
        ticks = sorted({x for s in series for x, _, _ in s.points})
        shown = [t for i, t in enumerate(ticks) if len(ticks) < 7 or i % 2 == 0]
        picture = draw.log_plot(series, "rows of x", "µs", joined=True, x_ticks=shown)
        made.append(_figure(f"Crossover: {title}", picture, "Time of one product; lower is better"))
    return made


def _peers(run: Run) -> list[str]:
    groups: dict[str, list[tuple[str, str, float]]] = {}
    for name, peer, ratio in against_peers(run):
        groups.setdefault(_family(name), []).append((name, peer, ratio))
    for rows in groups.values():
        rows.sort(key=lambda row: _natural(row[0]))
    return [
        _figure(f"Speed against peers: {family}", draw.ratios(part), "Right of the line: faster.")
        for family, rows in groups.items()
        for part in _parts(rows, 16)
    ]


def _shares(run: Run) -> list[str]:
    rows = [
        (cell.name, US, cell.shares[US], f"{cell.shares[US]:.0%}")
        for cell in run.cells
        if US in cell.shares
    ]
    return [
        _figure("Share of the floor", draw.bars(part, whole=1.0), "Dashed: the floor itself.")
        for part in _parts(rows, 20)
    ]


def _peaks(run: Run) -> list[str]:
    rows = [
        (cell.name, who, value, f"{value / 1e6:.1f} MB")
        for cell in run.cells
        for who, value in cell.peaks.items()
        if len(cell.peaks) > 1
    ]
    return [_figure("Peak memory", draw.bars(part), "") for part in _parts(rows, 16)]


def _parts(rows: Sequence[object], size: int) -> list[list]:  # type: ignore[type-arg]
    return [list(rows[i : i + size]) for i in range(0, len(rows), size)]


def _family(name: str) -> str:
    return re.split(r"[- ]", name)[0] + (" " + name.split()[1] if name.startswith("linear") else "")


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts m8 before m16, and cells of one shape together."""
    parts = re.split(r"(\d+)", " ".join(reversed(re.split(r"[ -]", name))))
    return [(int(part), "") if part.isdigit() else (0, part) for part in parts]


def _figure(title: str, picture: str, note: str) -> str:
    caption = f'<p class="caption">{escape(note)}</p>' if note else ""
    return f"<figure><h4>{escape(title)}</h4>{picture}{caption}</figure>"


def _time(seconds: float) -> str:
    return f"{seconds * 1e6:.1f} µs" if seconds < 1e-3 else f"{seconds * 1e3:.2f} ms"


COLOURS = (
    "--bg:#fff;--card:#f6f7f9;--ink:#1b1f24;--dim:#5b6470;--line:#d9dee5;--ok:#1e7d4f;"
    "--bad:#b3261e;--c0:#2f55d4;--c1:#c4572b;--c2:#9a4fb0;--c3:#6b6f76;--c4:#a87a00;--c5:#007f92;"
    "--c6:#b83a6b;--c7:#5b7a00;"
)
DARK = (
    "--bg:#14171b;--card:#1d2126;--ink:#e7eaee;--dim:#9aa4b0;--line:#363c44;--ok:#63d3a0;"
    "--bad:#ff8a80;--c0:#8ea6ff;--c1:#ff9a6b;--c2:#d59bf0;--c3:#b3b8c0;--c4:#e6bf4d;--c5:#58cfe3;"
    "--c6:#ff8fb6;--c7:#b9d65c;"
)
PLOT_STYLE = """
svg text{fill:var(--dim)}svg .name{fill:var(--ink)}svg .dim{fill:var(--dim)}
.grid{stroke:var(--line);stroke-width:1}.axis{stroke:var(--dim);stroke-width:1.2}
.rule{stroke:var(--dim);stroke-width:1.4;stroke-dasharray:5 4;fill:none}
.stroke{stroke:var(--c);stroke-width:2;fill:none;stroke-linejoin:round}.fill{fill:var(--c)}
.win{fill:var(--ok)}.loss{fill:var(--bad)}
.s0{--c:var(--c0)}.s1{--c:var(--c1)}.s2{--c:var(--c2)}.s3{--c:var(--c3)}.s4{--c:var(--c4)}
.s5{--c:var(--c5)}.s6{--c:var(--c6)}.s7{--c:var(--c7)}
"""
_STYLE = f"""
:root{{color-scheme:light dark;{COLOURS}}}
@media(prefers-color-scheme:dark){{:root{{{DARK}}}}}{PLOT_STYLE}
*{{box-sizing:border-box}}
body{{margin:0;background:var(--bg);color:var(--ink);font:16px/1.5 system-ui,sans-serif}}
main{{max-width:1180px;margin:0 auto;padding:24px 16px 48px}}
h1{{font-size:1.7rem;margin:0}}h2{{font-size:1.3rem;margin:0 0 10px}}
h3{{font-size:1.05rem;margin:22px 0 8px}}h4{{font-size:1rem;margin:0 0 8px}}
header p{{color:var(--dim);max-width:46rem}}a{{color:var(--c0)}}
section{{margin-top:32px;padding-top:20px;border-top:2px solid var(--line)}}
dl{{display:flex;flex-wrap:wrap;gap:2px 20px;margin:0;font-size:.9rem}}
dt,dd{{display:inline;margin:0}}dt{{color:var(--dim)}}dd{{font-weight:600;overflow-wrap:anywhere}}
.wide{{overflow-x:auto}}
table{{border-collapse:collapse;width:100%;font-size:.9rem;font-variant-numeric:tabular-nums}}
th,td{{padding:5px 10px;border-bottom:1px solid var(--line);text-align:right}}
th{{color:var(--dim)}}th:first-child,td:first-child{{text-align:left;padding-left:0}}
.met{{color:var(--ok);font-weight:600}}.missed{{color:var(--bad);font-weight:600}}
.charts{{columns:2 420px;column-gap:16px;margin-top:20px}}
figure{{margin:0 0 16px;padding:16px;background:var(--card);border-radius:8px;break-inside:avoid}}
svg{{display:block;width:100%;height:auto;font-size:13px}}
.legend{{display:flex;flex-wrap:wrap;gap:4px 16px;font-size:.86rem;margin-top:6px}}
.key i{{display:inline-block;width:11px;height:11px;border-radius:50%;background:var(--c);
margin-right:6px}}
.caption{{color:var(--dim);font-size:.86rem;margin:6px 0 0}}
.notes{{font-size:.86rem;color:var(--dim);overflow-wrap:anywhere}}
@media(max-width:560px){{
figure{{padding:10px}}thead{{display:none}}
tr{{display:grid;grid-template-columns:1fr 1fr 1fr;padding:5px 0;
border-bottom:1px solid var(--line)}}
td{{border:0;padding:1px 0}}td:first-child{{grid-column:1/4}}td:nth-child(2){{text-align:left}}
}}
"""
