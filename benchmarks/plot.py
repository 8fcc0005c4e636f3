"""Pure: the plot: one panel a metric, one bar a peer, as SVG text."""

from collections.abc import Mapping
from typing import Any, Final
from xml.sax.saxutils import escape

from benchmarks.report import ROWS, Report, Row

COLUMNS: Final = 3
PANEL_WIDTH: Final = 400
LABEL_WIDTH: Final = 112
VALUE_WIDTH: Final = 104
BAR_HEIGHT: Final = 16
BAR_STEP: Final = 22
PANEL_HEAD: Final = 34
MARGIN: Final = 20
TITLE_HEIGHT: Final = 56
BASE: Final = "nginx"
UNPLOTTED: Final = "direct"  # its bars would make all others short

_COLOURS: Final = {
    "fx": "#1769aa",
    "fx-noresume": "#7fb2da",
    "workers": "#0b3c5d",
    "nginx": "#4b8b3b",
    "ssh-tty": "#b5651d",
    "ssh": "#dba15f",
    "fx-web": "#1769aa",
    "nginx-web": "#4b8b3b",
}
_SHORT: Final = {
    "fx": "FX Gateway",
    "fx-noresume": "FX, no resume",
    "workers": "FX, 2 workers",
    "nginx": "nginx 2 hops",
    "ssh-tty": "ssh -tt -R",
    "ssh": "ssh -N -R",
    "fx-web": "FX Gateway",
    "nginx-web": "nginx 2 hops",
}


def _text(x: float, y: float, words: str, size: int, *, anchor: str = "start", weight: str = "400", colour: str = "#1c1c1c") -> str:
    style = f'font-size="{size}" text-anchor="{anchor}" font-weight="{weight}" fill="{colour}"'
    return f'<text x="{x:.1f}" y="{y:.1f}" {style}>{escape(words)}</text>'


def _panel(row: Row, values: Mapping[str, float], left: float, top: float) -> list[str]:
    better = "less is better" if row.less_is_better else "more is better"
    parts = [_text(left, top + 14, row.title, 13, weight="600"), _text(left, top + 28, better, 10, colour="#6b6b6b")]
    highest = max(values.values()) or 1.0
    room = PANEL_WIDTH - LABEL_WIDTH - VALUE_WIDTH - MARGIN
    base = values.get(BASE)
    for index, (peer, value) in enumerate(values.items()):
        y = top + PANEL_HEAD + index * BAR_STEP
        width = max(1.0, room * max(value, 0.0) / highest)
        ratio = f" · {value / base:.2f}×" if row.compared and base and base > 0 and peer != BASE else ""
        parts.append(_text(left + LABEL_WIDTH - 6, y + 12, _SHORT.get(peer, peer), 11, anchor="end"))
        colour = _COLOURS.get(peer, "#888888")
        parts.append(f'<rect x="{left + LABEL_WIDTH:.1f}" y="{y:.1f}" width="{width:.1f}" height="{BAR_HEIGHT}" rx="2" fill="{colour}"/>')
        weight = "600" if peer == "fx" else "400"
        parts.append(_text(left + LABEL_WIDTH + width + 6, y + 12, f"{value:,.{row.digits}f}{ratio}", 11, weight=weight))
    return parts


def _panels(report: Report) -> list[tuple[Row, dict[str, float]]]:
    panels = []
    for row in ROWS:
        by_peer = report["medians"].get(row.measure, {})
        values = {p: by_peer[p][row.metric] for p in report["peers"] if p != UNPLOTTED and row.metric in by_peer.get(p, {})}
        if values and row.plotted:
            panels.append((row, values))
    return panels


def svg(report: Report) -> str:
    """The plot of a report. The number behind each value is its ratio to nginx."""
    panels = _panels(report)
    rows = [panels[i : i + COLUMNS] for i in range(0, len(panels), COLUMNS)]
    heights = [PANEL_HEAD + BAR_STEP * max(len(values) for _, values in row) + MARGIN for row in rows]
    width = COLUMNS * PANEL_WIDTH + 2 * MARGIN
    height = TITLE_HEIGHT + sum(heights) + MARGIN
    body = _title(report)
    top = float(TITLE_HEIGHT + MARGIN / 2)
    for row, row_height in zip(rows, heights, strict=True):
        for column, (metric, values) in enumerate(row):
            body += _panel(metric, values, MARGIN + column * PANEL_WIDTH, top)
        top += row_height
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
            'font-family="system-ui, -apple-system, Segoe UI, Helvetica, Arial, sans-serif">',
            f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
            *body,
            "</svg>",
            "",
        ]
    )


def _title(report: Report) -> list[str]:
    machine: Mapping[str, Any] = report["machine"]
    where = f"{report['date']} · {machine['cpu']}, {machine['cores']} cores · Linux {machine['kernel']} · medians of {report['rounds']}"
    return [
        _text(MARGIN, 28, "FX Gateway beside nginx and OpenSSH, one machine, one run", 18, weight="600"),
        _text(MARGIN, 46, where + " · n× is the ratio to nginx", 11, colour="#6b6b6b"),
    ]
