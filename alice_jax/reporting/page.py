"""A page of HTML in one file: checks at the top, then sections of text, tables and embedded pictures."""

import base64
import dataclasses
import html
from collections.abc import Iterable, Sequence

from alice_jax.reporting.figures import DPI

STYLE = """
:root { color-scheme: light; --ink: #1c2530; --soft: #5b6875; --line: #e2e7ec; --paper: #f6f8fa; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, "Segoe UI", Roboto,
  "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1240px; margin: 0 auto; padding: 28px 24px 60px; }
h1 { font-size: 27px; margin: 0; letter-spacing: -.01em; }
h2 { font-size: 19px; margin: 0 0 4px; }
p { margin: 4px 0 10px; max-width: 90ch; color: var(--soft); }
nav { margin: 12px 0 18px; display: flex; flex-wrap: wrap; gap: 6px 18px; }
a { color: #1d5fc2; text-decoration: none; }
section { background: #fff; border: 1px solid var(--line); border-radius: 10px; padding: 18px 20px; margin: 16px 0; }
figure { margin: 12px 0 4px; }
img { display: block; max-width: 100%; height: auto; border-radius: 4px; }
figcaption { color: var(--soft); font-size: 13.5px; margin-top: 6px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13.5px; font-variant-numeric: tabular-nums; }
th { text-align: left; font-weight: 600; color: var(--soft); }
th, td { padding: 3px 18px 3px 0; border-bottom: 1px solid var(--line); white-space: nowrap; }
.checks { display: grid; grid-template-columns: repeat(auto-fill, minmax(330px, 1fr)); gap: 8px 14px;
  margin-top: 10px; }
.check { display: flex; gap: 10px; }
.check b { display: block; }
.check span { color: var(--soft); font-size: 13.5px; line-height: 1.4; display: block; }
.sign { flex: none; width: 22px; height: 22px; border-radius: 50%; color: #fff; text-align: center; line-height: 22px;
  font-size: 13px; font-weight: 700; margin-top: 1px; }
.good .sign { background: #1a8f4c; } .look .sign { background: #d98a00; } .bad .sign { background: #cc2f2f; }
.bad b { color: #b21f1f; } .look b { color: #8a5800; }
pre { font: 12.5px/1.45 ui-monospace, "DejaVu Sans Mono", monospace; margin: 8px 0 0; overflow-x: auto; }
details { margin-top: 8px; } summary { cursor: pointer; color: #1d5fc2; }
"""
SIGNS = {"good": "✓", "look": "!", "bad": "✗"}


@dataclasses.dataclass(frozen=True)
class Check:
    """One thing that is as it should be ("good"), worth a look ("look") or wrong ("bad")."""

    level: str
    name: str
    text: str


@dataclasses.dataclass(frozen=True)
class Section:
    """A titled box; `parts` are pieces of HTML made by the functions below."""

    title: str
    parts: Sequence[str]

    @property
    def anchor(self) -> str:
        return "".join(c if c.isalnum() else "-" for c in self.title.lower())


def text(words: str) -> str:
    return f"<p>{html.escape(words)}</p>"


def picture(png: bytes, caption: str = "", alt: str = "") -> str:
    """A PNG, narrower where the window is."""
    width = int.from_bytes(png[16:20], "big") * 100 // DPI  # of the IHDR chunk
    data = base64.b64encode(png).decode()
    below = f"<figcaption>{html.escape(caption)}</figcaption>" if caption else ""
    return (
        f'<figure><img alt="{html.escape(alt or caption)}" width="{width}" src="data:image/png;base64,{data}">'
        f"{below}</figure>"
    )


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    def line(cells: Iterable[object], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(str(cell))}</{tag}>" for cell in cells) + "</tr>"

    head = f"<thead>{line(header, 'th')}</thead>" if header else ""
    body = "".join(line(row, "td") for row in rows)
    return f'<div class="scroll"><table>{head}<tbody>{body}</tbody></table></div>'


def plain(lines: str) -> str:
    """Text whose spaces and line ends count."""
    return f"<pre>{html.escape(lines)}</pre>"


def folded(summary: str, part: str) -> str:
    """A part that is shown on a click."""
    return f"<details><summary>{html.escape(summary)}</summary>{part}</details>"


def render(title: str, subtitle: str, checks: Sequence[Check], sections: Sequence[Section]) -> str:
    """The whole page."""
    items = "".join(
        f'<div class="check {check.level}"><div class="sign">{SIGNS[check.level]}</div>'
        f"<div><b>{html.escape(check.name)}</b><span>{html.escape(check.text)}</span></div></div>"
        for check in checks
    )
    links = "".join(f'<a href="#{s.anchor}">{html.escape(s.title)}</a>' for s in sections)
    boxes = "\n".join(
        f'<section id="{s.anchor}"><h2>{html.escape(s.title)}</h2>{"".join(s.parts)}</section>' for s in sections
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head>\n<body><main>"
        f"<header><h1>{html.escape(title)}</h1><p>{html.escape(subtitle)}</p></header><nav>{links}</nav>\n"
        f'<section id="checks"><h2>At a glance</h2><div class="checks">{items}</div></section>\n{boxes}\n'
        "</main></body></html>\n"
    )
