"""`report.html`: one page without scripts and without anything from elsewhere. All data is escaped."""

import html
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from app.scoring.measures import Score
from app.scoring.score_words import amount, title
from app.training.curves import Curve, curves_of
from app.training.examples import Example
from app.training.report.contents import (
    MAX_SHOWN,
    MEASURED_ON,
    AnsweredExample,
    Candidate,
    Report,
    TrialRow,
    tokens_per_second,
)
from app.training.report.curves import curve_svg

_MAX_CHARS = 600  # of a text that is shown
_POINTS = 200  # of a curve
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")  # no character of a page
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
_STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; --good: #2d8a55; --bad: #c2463b; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin-bottom: 0.2rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; vertical-align: top; padding: 0.35rem 0.6rem;
  border-bottom: 1px solid var(--line); }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
tr.chosen td { font-weight: 600; }
.verdict { font-size: 1.15rem; } .note { opacity: 0.75; font-size: 0.9rem; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: isolate;
  font-family: ui-monospace, monospace; font-size: 0.85rem; }
.right { color: var(--good); } .wrong { color: var(--bad); }
figure { margin: 1rem 0; background: #fff; border: 1px solid var(--line); border-radius: 6px;
  overflow-x: auto; }
figure svg { display: block; max-width: 100%; height: auto; }
li.warning::marker { content: "! "; }
"""


def report_page(*reports: Report) -> str:
    """Return the whole page; of tasks that learned together, one after the other."""
    heading = "; ".join(map(_heading, reports))
    body = "\n".join(part for number, report in enumerate(reports) for part in _parts(report, number))
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="content-security-policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_text(heading)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def _heading(report: Report) -> str:
    return f"{report.task}: a prompt trained on {report.base}"


def _parts(report: Report, number: int) -> list[str]:
    """Return what stands below each other; `number` is the report's on the page."""
    return [
        f"<h1>{_text(_heading(report))}</h1>",
        f'<p class="verdict">{_text(report.verdict())}</p>',
        _lines("warning", [*report.warnings, *report.history.advice, *report.notes]),
        f"<h2>On {len(report.answered)} {MEASURED_ON[report.measured_on]}</h2>",
        _score_table(report),
        "<h2>Curves</h2>",
        *_figures(report, number),
        _trials(report.trials),
        *_examples("Wrong answers", "wrong", [each for each in report.answered if not each.is_right]),
        *_examples("Right answers", "right", [each for each in report.answered if each.is_right]),
        "<h2>Run</h2>",
        _facts(_run_facts(report)),
        "<h2>Settings</h2>",
        _facts(report.settings),
    ]


def shown_inputs(example: Example) -> str:
    """Return the inputs as one text: a field, or a message, on a line each."""
    if example.messages:
        return "\n".join(f"{message.role}: {message.content}" for message in example.messages)
    if isinstance(example.inputs, str):
        return example.inputs
    return "\n".join(f"{name}: {value}" for name, value in example.inputs.items())


def _text(value: object) -> str:
    """Return any value as text that is safe in an element or a quoted attribute."""
    text = value if isinstance(value, str) else json.dumps(value)
    if len(text) > _MAX_CHARS:
        text = f"{text[:_MAX_CHARS]} ... ({len(text)} characters)"
    return html.escape(_CONTROL.sub("\N{REPLACEMENT CHARACTER}", text))


def _lines(kind: str, lines: Sequence[str]) -> str:
    items = "".join(f'<li class="{kind}">{_text(line)}</li>' for line in lines)
    return f"<ul>{items}</ul>" if items else ""


def _table(heads: Iterable[str], rows: Iterable[str]) -> str:
    return f"<table><thead><tr>{''.join(heads)}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _score_table(report: Report) -> str:
    names = list(report.trained.scores)
    heads = ["<th></th>", *(f'<th class="number">{_text(title(name))}</th>' for name in names)]
    note = (
        '<p class="note">With 95% intervals. Texts were generated greedily, by the engine that serves; '
        "choices are the most probable labels, whatever would have been generated.</p>"
    )
    return _table(heads, (_score_row(each, names) for each in report.candidates)) + note


def _score_row(candidate: Candidate, names: Sequence[str]) -> str:
    template = (
        "" if candidate.template is None else f'<div class="text note">{_text(candidate.template)}</div>'
    )
    cells = "".join(f'<td class="number">{_score(candidate.scores.get(name))}</td>' for name in names)
    return f"<tr><td>{_text(candidate.name)}{template}</td>{cells}</tr>"


def _score(score: Score | None) -> str:
    if score is None:
        return "-"
    value, low, high = (amount(score.metric.name, each) for each in (score.metric.value, *score.interval))
    return f'{value}<div class="note">{low} to {high}</div>'


def _figures(report: Report, number: int) -> list[str]:
    curves = curves_of(report.history)
    losses = {name: curves.pop(name).thinned(_POINTS) for name in [*curves] if name.endswith("loss")}
    drawn = [_figure(losses, "loss on the answers' tokens", report.best_step, 2 * number)] if losses else []
    if curves:
        title = "scores on the dev set (dashed: the step that was kept)"
        drawn.append(_figure(curves, title, report.best_step, 2 * number + 1))
    return drawn


def _figure(curves: Mapping[str, Curve], title: str, best_step: int, number: int) -> str:
    svg = curve_svg(curves, title, best_step=best_step or None, number=number)
    return f"<figure>{svg}</figure>"


def _trials(trials: Sequence[TrialRow]) -> str:
    if not trials:
        return ""
    names = list(dict.fromkeys(name for row in trials for name in row.settings))
    heads = [
        *(f"<th>{_text(name)}</th>" for name in names),
        *(f'<th class="number">{name}</th>' for name in ("steps", "dev score")),
    ]
    return "<h2>Sweep</h2>" + _table(heads, (_trial_row(row, names) for row in trials))


def _trial_row(row: TrialRow, names: Sequence[str]) -> str:
    cells = "".join(f"<td>{_text(row.settings.get(name))}</td>" for name in names)
    figures = f'<td class="number">{row.steps}</td><td class="number">{row.score:.1%}</td>'
    return f'<tr class="{"chosen" if row.is_chosen else "trial"}">{cells}{figures}</tr>'


def _examples(title: str, kind: str, answered: Sequence[AnsweredExample]) -> list[str]:
    heads = ["<th>inputs</th>", "<th>expected</th>", "<th>generated</th>"]
    more = f" (the first {MAX_SHOWN})" if len(answered) > MAX_SHOWN else ""
    rows = (_example_row(each, kind) for each in answered[:MAX_SHOWN])
    table = _table(heads, rows) if answered else "<p>None.</p>"
    return [f"<h2>{title}: {len(answered)}{more}</h2>", table]


def _example_row(answered: AnsweredExample, kind: str) -> str:
    texts = [
        ("text", shown_inputs(answered.example)),
        ("text", answered.example.output),
        (f"text {kind}", answered.generated),
    ]
    cells = (f'<td><div class="{name}" dir="auto">{_text(text)}</div></td>' for name, text in texts)
    return f"<tr>{''.join(cells)}</tr>"


def _run_facts(report: Report) -> dict[str, Any]:
    rate = tokens_per_second(report.history.steps)
    splits = ", ".join(f"{count} {name}" for name, count in report.num_examples.items())
    return {
        "base": f"{report.base}, fingerprint {report.base_fingerprint}",
        "data": f"{report.data}: {splits}; sha256 {report.data_sha256}",
        "template": report.template if report.template is not None else "none: the inputs as they are",
        "steps": f"{len(report.history.steps)}, of which step {report.best_step} was kept",
        "time": f"{report.seconds:.0f} s; {rate:.0f} tokens per second in training",
        "prompt": f"{report.prompt_bytes:,} bytes",
        "code": ", ".join(f"{name} {value}" for name, value in (report.code or {}).items()) or "unknown",
    }


def _facts(facts: Mapping[str, Any]) -> str:
    rows = (
        f'<tr><th>{_text(name)}</th><td><div class="text">{_text(value)}</div></td></tr>'
        for name, value in facts.items()
    )
    return f"<table><tbody>{''.join(rows)}</tbody></table>"
