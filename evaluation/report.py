"""The report's page: tabs of tables, plots, players and commands in one HTML file that loads nothing from anywhere.

Everything from data files is escaped, and a content security policy forbids the page to fetch anything at all.
"""

import html
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; img-src data: blob:; font-src data:; worker-src blob:; "
    "script-src 'unsafe-inline' 'unsafe-eval'"  # plotly.js compiles its 3-D shaders' glue at run time
)


@dataclass
class Page:
    """The tabs of one run; each holds pieces of HTML, added in order."""

    title: str
    subtitle: str
    tabs: dict[str, list[str]] = field(default_factory=dict)
    payloads: list[tuple[str, Any]] = field(default_factory=list)
    numbers: Iterator[int] = field(default_factory=itertools.count)
    prefix: str = "run0"

    def add(self, tab: str, *pieces: str) -> None:
        """Append pieces of HTML to a tab, made if it is new."""
        self.tabs.setdefault(tab, []).extend(pieces)

    def plot(self, figure: Mapping[str, Any] | None, heading: str, note: str = "") -> str:
        """Return the place of a plotly figure; empty for none."""
        if figure is None:
            return ""
        source = self._payload(figure)
        return f"{heading3(heading, note)}<div class='plot' data-source='{source}'></div>"

    def grid(self, pieces: Sequence[str]) -> str:
        """Return pieces two beside each other."""
        return "<div class='grid'>" + "".join(f"<div>{piece}</div>" for piece in pieces) + "</div>"

    def player(self, recorded: Mapping[str, Any], captions: Sequence[str], size: tuple[int, int]) -> str:
        """Return a player of recorded episodes, one view per caption: frames, or paths on a canvas."""
        source = self._payload(recorded)
        width, height = size
        view = f"<img width='{width}' height='{height}' alt=''>" if "frames" in recorded else (
            f"<canvas width='{width}' height='{height}'></canvas>")  # fmt: skip
        views = "".join(f"<figure>{view}<figcaption>{escape(caption)}</figcaption></figure>" for caption in captions)
        slider = "<input type='range' min='0' value='0' aria-label='step'>"
        controls = f"<div class='controls'><button type='button'>Play</button>{slider}</div>"
        return f"<div class='player' data-source='{source}'>{controls}<div class='players'>{views}</div></div>"

    def _payload(self, value: Any) -> str:
        name = f"{self.prefix}-data{next(self.numbers)}"
        self.payloads.append((name, value))
        return name


def escape(value: object) -> str:
    """Text for HTML."""
    return html.escape(str(value), quote=True)


def heading3(title: str, note: str = "") -> str:
    """A heading with a line of explanation."""
    return f"<h3>{escape(title)}</h3>" + (f"<p class='soft'>{escape(note)}</p>" if note else "")


def paragraph(text: str) -> str:
    """A paragraph."""
    return f"<p>{escape(text)}</p>"


def command(line: str) -> str:
    """A command to copy."""
    return f"<pre>{escape(line)}</pre>"


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows that share their keys."""
    if not rows:
        return paragraph("none")
    head = "".join(f"<th>{escape(name)}</th>" for name in rows[0])
    body = "".join("<tr>" + "".join(f"<td>{escape(_cell(v))}</td>" for v in row.values()) + "</tr>" for row in rows)
    return f"<div class='wide'><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:,.2f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def render_page(title: str, introduction: str, pages: Sequence[Page]) -> str:
    """Return the whole document: one page of tabs per run, and a bar to choose the run where there are several."""
    from plotly.offline import get_plotlyjs

    runs = [(f"run{number}", page) for number, page in enumerate(pages)]
    chooser = ""
    if len(runs) > 1:
        buttons = [_button(name, page.title, number == 0) for number, (name, page) in enumerate(runs)]
        chooser = f"<nav role='tablist' aria-label='runs'>{''.join(buttons)}</nav>"
    sections = "".join(_section(name, page, number > 0) for number, (name, page) in enumerate(runs))
    payloads = "".join(
        f"<script type='application/json' id='{name}'>{_script_json(value)}</script>"
        for _, page in runs
        for name, value in page.payloads
    )
    return (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        f"<meta http-equiv='Content-Security-Policy' content=\"{POLICY}\">"
        "<meta name='viewport' content='width=device-width, initial-scale=1'><link rel='icon' href='data:,'>"
        f"<title>{escape(title)}</title><style>{_asset('report.css')}</style></head><body>"
        f"<header><h1>{escape(title)}</h1><p class='soft'>{escape(introduction)}</p></header>"
        f"<main>{chooser}{sections}</main>{payloads}"
        f"<script>{get_plotlyjs()}</script><script>{_asset('report.js')}</script></body></html>\n"
    )


def _section(name: str, page: Page, hidden: bool) -> str:
    tabs = list(page.tabs)
    buttons = "".join(_button(f"{name}-tab{number}", tab, number == 0) for number, tab in enumerate(tabs))
    panels = ""
    for number, tab in enumerate(tabs):
        hide = " hidden" if number else ""
        panels += f"<section id='{name}-tab{number}' role='tabpanel'{hide}>{''.join(page.tabs[tab])}</section>"
    head = f"<h2>{escape(page.title)}</h2><p class='soft'>{escape(page.subtitle)}</p>"
    bar = f"<nav role='tablist' aria-label='parts of {escape(page.title)}'>{buttons}</nav>"
    return f"<section id='{name}'{' hidden' * hidden}>{head}{bar}{panels}</section>"


def _button(panel: str, text: str, selected: bool) -> str:
    focus = "0" if selected else "-1"
    state = str(selected).lower()
    return (
        f"<button type='button' role='tab' data-panel='{panel}' aria-controls='{panel}' aria-selected='{state}' "
        f"tabindex='{focus}'>{escape(text)}</button>"
    )


def _script_json(value: Any) -> str:
    """JSON that cannot end the script element it stands in."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _asset(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")
