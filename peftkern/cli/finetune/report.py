"""The report of a fine-tuning run as one page that loads nothing from anywhere."""

from __future__ import annotations

from html import escape
from typing import Any

from peftkern.cli.machine import human_bytes, human_seconds
from peftkern.cli.plots import Line, curves

_STYLE = """
:root{color-scheme:light dark;--ink:#1c1f24;--dim:#5c636d;--line:#d9dde3;--card:#f6f7f9;
--c0:#4361c2;--c1:#c4572b}
@media(prefers-color-scheme:dark){:root{--ink:#e8eaed;--dim:#a2a9b4;--line:#363c44;--card:#1d2126;
--c0:#8ea6ff;--c1:#ff9a6b}}
body{font:16px/1.5 system-ui,sans-serif;color:var(--ink);margin:0}
main{max-width:820px;margin:0 auto;padding:24px 16px}
figure{margin:20px 0;padding:16px;background:var(--card);border-radius:8px;max-width:520px}
svg{display:block;width:100%;height:auto;font-size:13px}svg text{fill:var(--dim)}
.grid{stroke:var(--line)}.stroke{stroke:var(--c);stroke-width:2;fill:none}.fill{fill:var(--c)}
.s0{--c:var(--c0)}.s1{--c:var(--c1)}
.key i{display:inline-block;width:11px;height:11px;border-radius:50%;background:var(--c);
margin-right:6px}
dl{display:grid;grid-template-columns:max-content 1fr;gap:6px 18px}dt{color:var(--dim)}
dd{margin:0;overflow-wrap:anywhere}
pre{overflow-x:auto;background:var(--card);padding:12px;border-radius:8px;font-size:.8rem}
"""


def html_page(report: dict[str, Any]) -> str:
    """The page.

    Args:
        report: the content of report.json.
    """
    settings = report["settings"]
    facts = {
        "model": settings["model"],
        "data": settings["data"],
        "task": report["task"],
        "method": f"{settings['method']}: {report['summary']}",
        "items": ", ".join(f"{n} {half.replace('_', ' ')}" for half, n in report["items"].items()),
        "held out": ", ".join(f"{k} {v:.4g}" for k, v in report.get("held_out", {}).items()),
        "steps": f"{report['steps']} in {human_seconds(report['seconds'])}",
        "peak memory": human_bytes(report["peak_memory_bytes"]),
        "verify": report.get("verify", "not asked for"),
        "machine": f"{report['machine']['cpu']}, {report['machine']['cores']} core(s)",
        "versions": ", ".join(f"{k} {v or 'not installed'}" for k, v in report["versions"].items()),
    }
    listed = "".join(
        f"<dt>{escape(name)}</dt><dd>{escape(str(text))}</dd>" for name, text in facts.items()
    )
    patched = report["patch"]
    details = f"<h2>Patch report</h2><pre>{escape(patched)}</pre>" if patched else ""
    return (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>peftkern finetune</title><style>{_STYLE}</style></head><body><main>"
        f"<h1>Fine-tuning report</h1>{_picture(report['log'])}<dl>{listed}</dl>{details}"
        "</main></body></html>\n"
    )


def _picture(log: list[dict[str, Any]]) -> str:
    lines: list[Line] = []
    for key, name in (("loss", "training loss"), ("eval_loss", "held-out loss")):
        points = [(float(row["step"]), float(row[key])) for row in log if key in row]
        if points:
            xs, ys = zip(*points, strict=True)
            lines.append(Line(name, xs, ys, len(lines)))
    return f"<figure>{curves(lines, 'step', 'loss')}</figure>" if lines else ""
