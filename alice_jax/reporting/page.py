"""A page of HTML in one file: checks at the top, then sections of text, tables and embedded pictures."""

import base64
import dataclasses
import html
from collections.abc import Iterable, Sequence

from alice_jax.reporting.figures import DPI

STYLE = """
:root { color-scheme: light dark; --ink: #1c2530; --soft: #55626f; --line: #e2e7ec; --paper: #f4f6f8; --card: #fff;
  --link: #1d5fc2; --good: #1a8f4c; --look: #a86a00; --bad: #c62828; --bad-paper: #fdecea; --look-paper: #fff6e5; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6ebf0; --soft: #a3b0bd; --line: #2b353f; --paper: #0c1116;
  --card: #151c23; --link: #7db1ff; --good: #2ea862; --look: #e0a030; --bad: #ff6b60; --bad-paper: #3a1a1a;
  --look-paper: #33280f; } .chart { filter: invert(1) hue-rotate(180deg); mix-blend-mode: screen; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, "Segoe UI", Roboto,
  "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1250px; margin: 0 auto; padding: 28px 24px 60px; }
h1 { font-size: 27px; line-height: 1.25; margin: 0; letter-spacing: -.01em; overflow-wrap: anywhere; }
h2 { font-size: 20px; margin: 0 0 4px; }
h3 { font-size: 15.5px; margin: 24px 0 0; }
p { margin: 4px 0 10px; max-width: 90ch; color: var(--soft); overflow-wrap: anywhere; }
nav { margin: 10px 0 16px; display: flex; flex-wrap: wrap; gap: 4px 18px; }
a { color: var(--link); text-decoration: none; } a:hover { text-decoration: underline; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 18px 20px;
  margin: 16px 0; }
figure { margin: 10px 0 6px; }
figure div { overflow-x: auto; }
img { display: block; max-width: 100%; height: auto; border-radius: 4px; }
figcaption { color: var(--soft); font-size: 13.5px; margin-top: 6px; max-width: 100ch; }
.scroll { overflow: auto; max-height: 460px; }
table { border-collapse: collapse; font-size: 13.5px; font-variant-numeric: tabular-nums; }
th { text-align: left; font-weight: 600; color: var(--soft); position: sticky; top: 0; background: var(--card); }
th, td { padding: 3px 18px 3px 0; border-bottom: 1px solid var(--line); white-space: nowrap; }
.checks { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(330px, 100%), 1fr)); gap: 6px;
  margin-top: 8px; }
.check { display: flex; gap: 10px; padding: 6px 8px; border-radius: 8px; }
.check div:last-child { min-width: 0; overflow-wrap: anywhere; }
.check b { display: block; }
.check span { color: var(--soft); font-size: 13.5px; line-height: 1.4; display: block; }
.sign { flex: none; width: 22px; height: 22px; border-radius: 50%; color: var(--card); text-align: center;
  line-height: 22px; font-size: 13px; font-weight: 700; margin-top: 1px; }
.good .sign { background: var(--good); } .look .sign { background: var(--look); } .bad .sign { background: var(--bad); }
.bad { background: var(--bad-paper); grid-column: 1 / -1; } .look { background: var(--look-paper); }
.bad b { color: var(--bad); } .look b { color: var(--look); } .bad span, .look span { color: var(--ink); }
pre { font: 12.5px/1.45 ui-monospace, "DejaVu Sans Mono", monospace; margin: 8px 0 0; overflow-x: auto; }
details { margin-top: 8px; } summary { cursor: pointer; color: var(--link); }
@media (max-width: 800px) { main { padding: 16px 10px 40px; } section { padding: 14px 12px; }
  figure .wide { min-width: 760px; max-width: none; } }
"""
SIGNS = {"bad": "✗", "look": "!", "good": "✓"}  # the worst first
NAMED = 5  # scans in a line


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


def heading(words: str) -> str:
    """Of a part of a section."""
    return f"<h3>{html.escape(words)}</h3>"


def listed(names: Sequence[str]) -> str:
    """A few of them.

    >>> listed(["a", "b"]), listed(list("abcdefg"))
    ('a, b', 'a, b, c, d, e and 2 more')
    """
    rest = len(names) - NAMED
    return ", ".join(names[:NAMED]) + (f" and {rest} more" if rest > 0 else "")


def picture(png: bytes, caption: str = "", alt: str = "", chart: bool = False) -> str:
    """A PNG, narrower where the window is, but to be scrolled where that is very narrow.

    Args:
      chart: whether it is dark on white, to be turned around where the page is dark.
    """
    width = int.from_bytes(png[16:20], "big") * 100 // DPI  # of the IHDR chunk
    data = base64.b64encode(png).decode()
    below = f"<figcaption>{html.escape(caption)}</figcaption>" if caption else ""
    kinds = " ".join(["wide"] * (width > 800) + ["chart"] * chart)
    image = f'<img alt="{html.escape(alt or caption)}" class="{kinds}" width="{width}"'
    return f'<figure><div>{image} src="data:image/png;base64,{data}"></div>{below}</figure>'


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
    """The whole page; checks are sorted, the worst first."""
    checks = sorted(checks, key=lambda check: list(SIGNS).index(check.level))
    wrong, look = (sum(check.level == level for check in checks) for level in ("bad", "look"))
    verdict = f"All {len(checks)} checks are good."
    if wrong or look:
        found = [f"{wrong} found something wrong"] * (wrong > 0) + [f"{look} something worth a look"] * (look > 0)
        verdict = f"Of {len(checks)} checks {' and '.join(found)}."
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
        f'<section id="checks"><h2>At a glance</h2><p>{verdict}</p><div class="checks">{items}</div></section>\n'
        f"{boxes}\n"
        "</main></body></html>\n"
    )
