"""The contract's result as one HTML page that needs no network, script or other file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from html import escape

from popen.data.contract import Report
from popen.data.contract_suite import Expectation

LISTED = 500  # quarantined records on the page; the JSON file has all

_STYLE = """
:root { color-scheme: light dark; --ink: #1c2430; --soft: #667085; --line: #e3e6ec; --page: #f6f7f9;
  --card: #fff; --good: #12805c; --bad: #c4322b; --warn: #a15c07; --bar: #4f6bed; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ef; --soft: #98a2b3; --line: #2d3542;
  --page: #11151b; --card: #1a2029; --good: #4cc38a; --bad: #ff7b72; --warn: #e5a54b; --bar: #7c93ff; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 68rem; margin: 0 auto; padding: 2rem 1rem 4rem; }
h1 { font-size: 1.5rem; margin: 0 0 .25rem; } h2 { font-size: 1.1rem; margin: 0 0 .75rem; }
section { background: var(--card); border: 1px solid var(--line); border-radius: .75rem;
  padding: 1rem 1.25rem; margin-top: 1rem; overflow-x: auto; }
.verdict { font-weight: 600; }
.good { color: var(--good); } .bad { color: var(--bad); } .warn { color: var(--warn); }
.soft { color: var(--soft); }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; padding: .35rem .75rem .35rem 0;
  border-top: 1px solid var(--line); }
th { color: var(--soft); font-weight: 500; border-top: 0; }
td.number, th.number { text-align: right; white-space: nowrap; }
td.text { overflow-wrap: anywhere; } code { font-size: .9em; } .mark { white-space: nowrap; }
.kinds { display: grid; grid-template-columns: repeat(auto-fill, minmax(18rem, 1fr)); gap: 1rem 2rem; }
.kinds h3 { font-size: .95rem; margin: 0 0 .25rem; }
.kind { display: grid; grid-template-columns: 7rem 1fr 3.5rem; gap: .5rem; align-items: center; }
.bar { height: .6rem; border-radius: .3rem; background: var(--bar); min-width: 2px; }
"""


def render(report: Report) -> str:
    """The page of a report, accepted or not. Everything from the data is escaped."""
    parts = [
        _verdict(report),
        _section("Rules", _expectations(report.expectations)),
        _section("Roles", _roles(report)),
        _section("Kinds of questions", _kinds(report)),
        _section("Quarantine", _quarantine(report)),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Data contract</title><style>{_STYLE}</style></head>\n<body><main>\n"
        + "\n".join(parts)
        + "\n</main></body></html>\n"
    )


def _section(title: str, body: str) -> str:
    return f"<section><h2>{title}</h2>{body}</section>"


def _table(head: Iterable[tuple[str, str]], rows: Iterable[Iterable[str]]) -> str:
    """Columns are (title, class); cells are HTML already."""
    columns = list(head)
    top = "".join(f'<th class="{css}">{title}</th>' for title, css in columns)
    body = "".join(
        "<tr>"
        + "".join(f'<td class="{css}">{cell}</td>' for cell, (_, css) in zip(row, columns, strict=True))
        + "</tr>"
        for row in rows
    )
    return f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"


def _verdict(report: Report) -> str:
    if not report.accepted:
        word, css = "Broken: the pipeline stops here", "bad"
    elif report.broken:
        word, css = "Kept, with records in the quarantine", "warn"
    else:
        word, css = "Kept", "good"
    failures = "".join(f'<p class="bad">{escape(text)}</p>' for text in report.failures)
    return (
        f'<h1>Data contract</h1><p class="verdict {css}">{word}</p>'
        f'<p class="soft">{report.records:,} records read, {report.broken_share:.2%} of them broken, '
        f"{report.tolerated:.2%} of a role tolerated.</p>{failures}"
    )


def _expectations(expectations: Iterable[Expectation]) -> str:
    head = [
        ("", ""),
        ("Rule", ""),
        ("Of the", ""),
        ("Checked", "number"),
        ("Broken", "number"),
        ("Found", "text"),
    ]
    rows = [
        (
            '<span class="mark good">&#10003; kept</span>'
            if e.success
            else '<span class="mark bad">&#10007; broken</span>',
            escape(e.name),
            escape(e.table),
            f"{e.checked:,}",
            f"{e.unexpected:,}",
            f"<code>{escape(e.observed)}</code>" if e.observed else "",
        )
        for e in expectations
    ]
    return _table(head, rows)


def _roles(report: Report) -> str:
    head = [
        ("Role", ""),
        ("Splits", "text"),
        ("Images", "number"),
        ("Questions", "number"),
        ("Targets", "number"),
        ("Broken", "number"),
    ]
    rows = [
        (
            escape(role),
            f"<code>{escape(', '.join(report.splits[role]))}</code>",
            f"{len({sample.image for sample in samples}):,}",
            f"{len(samples):,}",
            f"{sum(len(sample.targets) for sample in samples):,}",
            f"{report.shares[role]:.2%}",
        )
        for role, samples in report.samples.items()
    ]
    return _table(head, rows)


def _kinds(report: Report) -> str:
    charts = []
    for role, samples in report.samples.items():
        kinds = Counter(sample.kind for sample in samples if sample.kind)
        if not kinds:
            continue
        most = max(kinds.values())
        bars = "".join(
            f'<div class="kind"><span>{escape(kind)}</span>'
            f'<span class="bar" style="width:{100 * count / most:.1f}%"></span>'
            f'<span class="number">{count / kinds.total():.1%}</span></div>'
            for kind, count in kinds.most_common()
        )
        charts.append(f"<div><h3>{escape(role)}</h3>{bars}</div>")
    if not charts:
        return '<p class="soft">This data does not tell the kind of its questions.</p>'
    return f'<div class="kinds">{"".join(charts)}</div>'


def _quarantine(report: Report) -> str:
    if not report.broken:
        return '<p class="soft">Empty.</p>'
    head = [("File", "text"), ("Record", ""), ("Rule", "text")]
    rows = [
        (f"<code>{escape(item.file)}</code>", escape(item.record), escape(item.rule))
        for item in report.broken[:LISTED]
    ]
    more = len(report.broken) - LISTED
    rest = f'<p class="soft">and {more:,} more, in quarantine.jsonl</p>' if more > 0 else ""
    return _table(head, rows) + rest
