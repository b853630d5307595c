"""The demo's results as a terminal table and as one self-contained HTML page."""

from __future__ import annotations

from html import escape
from typing import Any, Literal

from rich.table import Table

from peftkern.cli.demo.checks import sigma
from peftkern.cli.machine import human_bytes, human_seconds
from peftkern.cli.plots import Bar, Line, Point, bars, curves, scatter_log_x, smooth

COLUMNS = (
    "method",
    "held-out accuracy",
    "trained",
    "peak memory",
    "weights",
    "checkpoint",
    "step",
    "total",
    "base task after",
)
_SHORT_COLUMNS = ("method", "accuracy", "trained", "memory", "weights", "on disk", "step", "base")
NOTES = (
    "± is the 95 % binomial interval of the held-out texts.",
    "linear probe: logistic regression on the frozen model's features, penalty chosen by "
    "cross-validation over groups of the training half.",
    "trained: parameters that train, and their share of the model's.",
    "peak memory: most resident bytes of the process while training; in brackets, what training "
    "added to the loaded model (gradients, optimizer state, activations).",
    "weights: bytes of all parameters, frozen and trained, as they lie in memory.",
    "step: median time of one optimizer step. Times belong to this run on this machine alone.",
    "base task after: share of first sentences that still find how their text goes on, what the "
    "encoder was made for. Methods that leave the base frozen have it back when switched off.",
)


def summary_rows(results: dict[str, Any], compact: bool = False) -> list[tuple[str, ...]]:
    """One tuple of cells a line, in the order of `COLUMNS`: baselines, then methods.

    Args:
        results: the content of results.json.
        compact: only what fits a terminal of 80 columns.
    """
    baselines = results["baselines"]
    held_out = sum(results["data"]["counts"]["held_out"].values())
    before = baselines.get("base_task")
    rows: list[tuple[str, ...]] = []
    for key, name in (("majority", "majority class"), ("probe", "linear probe")):
        if key in baselines:
            base = _retrieval(before) if key == "probe" else "-"
            blank = ["-"] * (4 if compact else 5)
            rows.append((name, _accuracy(baselines[key], held_out), "0", *blank, base))
    for row in results["methods"]:
        if row["status"] != "done":
            rows.append(
                (
                    row["title"],
                    row["status"],
                    *["-"] * (len(_SHORT_COLUMNS if compact else COLUMNS) - 2),
                )
            )
            continue
        memory = row["memory"]
        peak = human_bytes(memory["peak"])
        if not compact and memory["over_loaded"] is not None and memory["peak_is_of_training"]:
            peak += f" (+{human_bytes(memory['over_loaded'])})"
        rows.append(
            (
                row["title"],
                _accuracy(row["accuracy"], row["held_out"]),
                _share(row["share"])
                if compact
                else f"{_count(row['trainable'])} ({_share(row['share'])})",
                peak,
                human_bytes(row["weight_bytes"]),
                human_bytes(row["checkpoint_bytes"]),
                human_seconds(row["median_step_s"]),
                *(() if compact else (human_seconds(row["seconds"]),)),
                _retrieval(row["base_task"]),
            )
        )
    return rows


def summary_table(results: dict[str, Any]) -> Table:
    """The results for a terminal."""
    title = str(results["data"]["name"]) + (", a reduced run" if results["quick"] else "")
    table = Table(title=title, title_justify="left", box=None, padding=(0, 1, 0, 0), pad_edge=False)
    for index, column in enumerate(_SHORT_COLUMNS):
        justify: Literal["left", "right"] = "right" if index else "left"
        table.add_column(column, justify=justify)
    for row in summary_rows(results, compact=True):
        table.add_row(*row)
    return table


def html_page(results: dict[str, Any]) -> str:
    """The whole report as one HTML page that loads nothing from anywhere.

    Args:
        results: the content of results.json; at least one method must be done.
    """
    done = [row for row in results["methods"] if row["status"] == "done"]
    colours = {row["method"]: _colour(index) for index, row in enumerate(results["methods"])}
    sections = [
        _header(results),
        _table(results),
        _checks(results["checks"]),
        f'<div class="charts">{_charts(results, done, colours)}</div>',
        _about(results),
        _details(results, done),
    ]
    return (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>peftkern demo</title><style>{_STYLE}{_RINGS}</style></head>"
        f"<body><main>{''.join(sections)}</main></body></html>\n"
    )


def _colour(index: int) -> int:
    """Class of a method's marks: each colour once filled, then once more as a ring or dashes."""
    index %= 2 * _COLOURS
    return index if index < _COLOURS else index + 1  # the one between is grey


def _header(results: dict[str, Any]) -> str:
    flags = []
    if results["quick"]:
        flags.append(
            "This is a reduced run (--quick): few texts, one epoch. Its accuracies say little."
        )
    if results["interrupted"]:
        flags.append("This run was interrupted: what is missing was not measured.")
    banner = "".join(f'<p class="flag">{escape(flag)}</p>' for flag in flags)
    return (
        f"<header><h1>peftkern demo</h1><p>{escape(_model_name(results))}, fine-tuned on "
        f"{escape(results['data']['name'])} with {len(results['methods'])} methods on one "
        f"machine, the same batches for each.</p>{banner}</header>"
    )


def _table(results: dict[str, Any]) -> str:
    head = "".join(f"<th>{escape(column)}</th>" for column in COLUMNS)
    body = "".join(
        "<tr>"
        + "".join(
            f'<td{_EMPTY if cell == "-" else ""} data-name="{escape(COLUMNS[i])}">'
            f"{escape(cell)}</td>"
            for i, cell in enumerate(row)
        )
        + "</tr>"
        for row in summary_rows(results)
    )
    notes = "".join(f"<li>{escape(note)}</li>" for note in NOTES)
    return (
        f"<section><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
        f'<ul class="notes">{notes}</ul></section>'
    )


def _checks(checks: list[dict[str, Any]]) -> str:
    if not checks:
        return ""
    lines = []
    for line in checks:
        kind = "ok" if line["passed"] else "fail" if line["required"] else "note"
        lines.append(f'<li class="{kind}"><b>{kind}</b> {escape(line["text"])}</li>')
    return f'<section><h2>Checked</h2><ul class="checks">{"".join(lines)}</ul></section>'


def _charts(results: dict[str, Any], done: list[dict[str, Any]], colours: dict[str, int]) -> str:
    baselines = results["baselines"]
    rules = [
        (name, baselines[key])
        for key, name in (("probe", "frozen linear probe"), ("majority", "majority class"))
        if key in baselines
    ]
    points = [
        Point(
            row["title"],
            100 * row["share"],
            row["accuracy"],
            1.96 * sigma(row["accuracy"], row["held_out"]),
            colours[row["method"]],
        )
        for row in done
    ]
    made = [
        _chart(
            "Accuracy against trained share",
            scatter_log_x(
                points, rules, "share of the model that trains (log)", "held-out accuracy"
            ),
            "Bars: 95 % interval. Methods of equal share stand side by side.",
        ),
        _chart("Training loss", _loss_curves(done, colours), "Running mean."),
    ]
    measured = [row for row in done if row["memory"]["peak"] is not None]
    if measured:
        made.append(_chart("Peak memory", _memory_bars(measured, colours), ""))
    for title, key, human, note in (
        ("Weights in memory", "weight_bytes", human_bytes, "All parameters, frozen and trained."),
        ("Time of a step", "median_step_s", human_seconds, "Median over the run."),
        ("Checkpoint on disk", "checkpoint_bytes", human_bytes, ""),
    ):
        rows = [
            Bar(row["title"], (row[key],), human(row[key]), colours[row["method"]]) for row in done
        ]
        made.append(_chart(title, bars(rows), note))
    if results["baselines"].get("base_task"):
        made.append(_forgetting(results, done, colours))
    made += [_paging(row) for row in done if row.get("paging")]
    if results["low_data"]:
        made.append(_low_data(results, done, colours))
    return "".join(made)


def _forgetting(
    results: dict[str, Any], done: list[dict[str, Any]], colours: dict[str, int]
) -> str:
    before = results["baselines"]["base_task"]
    rows = [Bar("before", (before["retrieval"],), _retrieval(before), _GREY)]
    for row in done:
        after = row["base_task"]
        text = f"{_retrieval(after)}, order kept {after['order']:.2f}"
        rows.append(Bar(row["title"], (after["retrieval"],), text, colours[row["method"]]))
    note = (
        f"Base task: {before['pairs']} first sentences, each to find how its text goes on among "
        "all the others. Order kept: rank correlation of all similarities with those before."
    )
    return _chart("Forgetting", bars(rows), note)


def _paging(row: dict[str, Any]) -> str:
    from peftkern.optim import paging_svg

    report = row["paging"]
    # Inside HTML the namespace goes without saying, and the page names no address.
    picture = paging_svg(report).replace(' xmlns="http://www.w3.org/2000/svg"', "")
    note = (
        f"{row['title']}: {human_bytes(report['total_bytes'])} of optimizer state, of which at "
        f"most {human_bytes(report['ram_budget'])} stay in memory."
    )
    return _chart("Optimizer state paged to disk", picture, note)


def _low_data(results: dict[str, Any], done: list[dict[str, Any]], colours: dict[str, int]) -> str:
    finished = {row["method"]: row["accuracy"] for row in done}
    most = sum(results["data"]["counts"]["train"].values())
    lines = []
    for row in results["low_data"]:
        points = [(p["texts"], p["accuracy"]) for p in row["points"]]
        if row["method"] in finished:
            points.append((most, finished[row["method"]]))
        lines.append(_low_data_line(row["title"], points, colours[row["method"]]))
    probed = [(p["texts"], p["probe"]) for p in results["low_data"][0]["points"]]
    probed.append((most, results["baselines"]["probe"]))
    lines.append(_low_data_line("linear probe", probed, _GREY))
    picture = curves(lines, "texts to train on (log)", "held-out accuracy", log_x=True)
    return _chart("Few texts", picture, "1 %, 10 % and all of the texts; same held-out half.")


def _low_data_line(name: str, points: list[tuple[int, float]], colour: int) -> Line:
    return Line(name, tuple(float(x) for x, _ in points), tuple(y for _, y in points), colour)


def _memory_bars(done: list[dict[str, Any]], colours: dict[str, int]) -> str:
    rows, split = [], all(row["memory"]["peak_is_of_training"] for row in done)
    for row in done:
        memory = row["memory"]
        parts = (memory["loaded"], memory["over_loaded"]) if split else (memory["peak"],)
        rows.append(Bar(row["title"], parts, human_bytes(memory["peak"]), colours[row["method"]]))
    return bars(rows, ("libraries and loaded model", "added by training") if split else ())


def _loss_curves(done: list[dict[str, Any]], colours: dict[str, int]) -> str:
    lines = []
    for row in done:
        losses = row["losses"]
        window = max(1, len(losses) // 12)
        steps = tuple(float(step) for step in range(1, len(losses) + 1))
        lines.append(Line(row["title"], steps, smooth(losses, window), colours[row["method"]]))
    return curves(lines, "step", "loss")


def _chart(title: str, picture: str, note: str) -> str:
    caption = f'<p class="caption">{escape(note)}</p>' if note else ""
    return f"<figure><h2>{escape(title)}</h2>{picture}{caption}</figure>"


def _about(results: dict[str, Any]) -> str:
    data, settings, machine = results["data"], results["settings"], results["machine"]
    counts = "; ".join(
        f"{half.replace('_', '-')}: " + ", ".join(f"{n} {label}" for label, n in labels.items())
        for half, labels in data["counts"].items()
    )
    methods = "".join(
        f"<dt>{escape(row['title'])}</dt><dd>{escape(row['summary'])}; peak learning rate "
        f"{row['lr']:g}</dd>"
        for row in results["methods"]
    )
    known = {name: version or "not installed" for name, version in results["versions"].items()}
    size = _count(results["model"]["parameters"])
    facts = {
        "model": f"{results['model']['origin']}; {size} parameters with mean pooling and a linear "
        "head",
        "texts": f"{data['description']} ({counts})",
        "training": f"{settings['epochs']} epoch(s), batches of {settings['batch_size']}, at most "
        f"{settings['max_tokens']} tokens a text, {settings['optimizer']}; seed {results['seed']}",
        "machine": f"{machine['cpu']}, {machine['cores']} core(s), "
        f"{human_bytes(machine['memory_bytes'])} memory, {machine['system']}",
        "versions": ", ".join(f"{name} {version}" for name, version in known.items()),
        "command": results["command"],
        "started": results["started"],
        "took": human_seconds(results.get("seconds")),
    }
    listed = "".join(
        f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in facts.items()
    )
    return (
        f"<section><h2>Methods</h2><dl>{methods}</dl></section>"
        f"<section><h2>This run</h2><dl>{listed}</dl></section>"
    )


def _details(results: dict[str, Any], done: list[dict[str, Any]]) -> str:
    reports = "".join(
        f"<details><summary>Patch report: {escape(row['title'])}</summary>"
        f"<pre>{escape(row['patch_report'])}</pre></details>"
        for row in done
        if row["patch_report"]
    )
    return f"<section>{reports}</section>" if reports else ""


def _model_name(results: dict[str, Any]) -> str:
    return str(results["model"]["source"])


def _accuracy(accuracy: float, count: int) -> str:
    return f"{100 * accuracy:.1f} ±{100 * 1.96 * sigma(accuracy, count):.1f} %"


def _retrieval(base_task: dict[str, Any] | None) -> str:
    if base_task is None:  # the texts are too short to be cut in two
        return "-"
    return f"{100 * base_task['retrieval']:.0f} %"


def _share(share: float) -> str:
    return f"{100 * share:.3g} %"


def _count(count: int) -> str:
    if count >= 1_000_000:
        return f"{count / 1e6:.1f} M"
    return f"{count / 1e3:.0f} K" if count >= 1000 else str(count)


_COLOURS, _GREY = 14, 14
_EMPTY = ' class="empty"'
_STYLE = """
:root{color-scheme:light dark;--bg:#fff;--card:#f6f7f9;--ink:#1b1f24;--dim:#5b6470;--line:#d9dee5;
--c0:#4361c2;--c1:#c4572b;--c2:#2a8a5f;--c3:#9a4fb0;--c4:#a87a00;--c5:#007f92;--c6:#b83a6b;
--c7:#5b7a00;--c8:#8a4b2a;--c9:#3d8fd1;--c10:#d04545;--c11:#6a4bd0;--c12:#00967a;
--c13:#a3508a;--c14:#6b6f76;--ok:#1e7d4f;--fail:#b3261e;--note:#8a6100}
@media(prefers-color-scheme:dark){:root{--bg:#14171b;--card:#1d2126;--ink:#e7eaee;--dim:#9aa4b0;
--line:#363c44;--c0:#8ea6ff;--c1:#ff9a6b;--c2:#63d3a0;--c3:#d59bf0;--c4:#e6bf4d;--c5:#58cfe3;
--c6:#ff8fb6;--c7:#b9d65c;--c8:#d9a07c;--c9:#86c5ff;--c10:#ff9a9a;--c11:#b7a2ff;--c12:#4fe0c0;
--c13:#e8a0d4;--c14:#b3b8c0;--ok:#63d3a0;--fail:#ff8a80;--note:#e6bf4d}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);font:16px/1.5 system-ui,sans-serif}
main{max-width:1120px;margin:0 auto;padding:24px 16px 48px}
h1{font-size:1.7rem;margin:0}h2{font-size:1.05rem;margin:0 0 10px}
header p{margin:4px 0 0;color:var(--dim)}
header .flag{color:var(--note);font-weight:600}
section{margin-top:28px}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums;font-size:.92rem}
th,td{padding:7px 10px;border-bottom:1px solid var(--line);text-align:right;white-space:nowrap}
th{color:var(--dim);font-weight:600;vertical-align:bottom;white-space:normal}
th:first-child,td:first-child{text-align:left;padding-left:0}
td:first-child{font-weight:600}
.notes,.checks{margin:12px 0 0;padding:0;list-style:none;font-size:.86rem}
.notes{color:var(--dim)}
.checks{font-size:.92rem}.checks li{display:flex;padding:3px 0}.checks b{flex:0 0 3em}
.ok b{color:var(--ok)}.fail b{color:var(--fail)}.note b{color:var(--note)}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,440px),1fr));
gap:16px;margin-top:28px;align-items:start}
figure{margin:0;padding:16px;background:var(--card);border-radius:8px}
svg{display:block;width:100%;height:auto;font-size:13px}
svg text{fill:var(--dim)}svg .name{fill:var(--ink)}
.grid{stroke:var(--line);stroke-width:1}
.rule{stroke:var(--dim);stroke-width:1.2;stroke-dasharray:5 4}
.stroke{stroke:var(--c);stroke-width:2;fill:none;stroke-linejoin:round}
.fill{fill:var(--c)}.pale{opacity:.42}
.s0{--c:var(--c0)}.s1{--c:var(--c1)}.s2{--c:var(--c2)}.s3{--c:var(--c3)}.s4{--c:var(--c4)}
.s5{--c:var(--c5)}.s6{--c:var(--c6)}.s7{--c:var(--c7)}.s8{--c:var(--c8)}.s9{--c:var(--c9)}
.s10{--c:var(--c10)}.s11{--c:var(--c11)}.s12{--c:var(--c12)}.s13{--c:var(--c13)}
.s14{--c:var(--c14)}
.legend{display:flex;flex-wrap:wrap;gap:4px 16px;font-size:.86rem;margin-top:6px}
.key i{display:inline-block;width:11px;height:11px;border-radius:50%;background:var(--c);
margin-right:6px}
.dash i{width:18px;height:0;border-radius:0;border-top:2px dashed var(--dim);
vertical-align:middle}
.caption{color:var(--dim);font-size:.86rem;margin:6px 0 0}
dl{display:grid;grid-template-columns:max-content 1fr;gap:6px 18px;margin:0;font-size:.92rem}
dt{color:var(--dim)}dd{margin:0;overflow-wrap:anywhere}
details{margin-top:8px}summary{cursor:pointer}
pre{overflow-x:auto;background:var(--card);padding:12px;border-radius:8px;font-size:.78rem}
@media(max-width:860px){
table,tbody,tr,td{display:block}thead{display:none}
tr{padding:10px 0;border-bottom:1px solid var(--line)}
td{display:flex;justify-content:space-between;gap:12px;padding:1px 0;border:0}
td::before{content:attr(data-name);color:var(--dim);font-weight:400}
td.empty{display:none}td:first-child{font-size:1rem}td:first-child::before{content:none}
dl{grid-template-columns:1fr;gap:0}dd{margin-bottom:8px}
}
"""
# Colours that come a second time: open dots and dashed curves.
_RINGS = "".join(
    f".s{_GREY + 1 + i}{{--c:var(--c{i})}}"
    f".s{_GREY + 1 + i} path.stroke{{stroke-dasharray:5 3}}"
    f".s{_GREY + 1 + i} circle.fill{{fill:var(--card);stroke:var(--c);stroke-width:2.5}}"
    f".s{_GREY + 1 + i}.key i{{background:none;border:2.5px solid var(--c)}}"
    for i in range(_COLOURS)
)
