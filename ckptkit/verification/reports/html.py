"""The report as one HTML page that needs nothing else: no scripts, no fonts, no network."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.resources import files
from typing import Any

from ckptkit.verification.reports.charts import Series, log_chart, name_shown, rank_map, shown
from ckptkit.verification.reports.contents import (
    DIFFERENCES,
    STEPS,
    WORST,
    Facts,
    details_of,
    difference_rows,
    fed_by,
    guilty_places,
    guilty_ranks,
    rollout_table,
    run_facts,
    side_facts,
    step_rows,
    title_of,
    worst_place,
    worst_rows,
)
from ckptkit.verification.reports.report import TRAINABILITY, VerificationReport
from ckptkit.verification.run_options import BACKWARD, EXACT

SOME = 5
"""Tensors that are named below a chart of them."""


def html_page(report: VerificationReport) -> str:
    """The whole page: the verdict, what differs, the answers, the run, and what is of interest now and then folded."""
    data = report.to_dict()
    details = details_of(data, "logits")
    sections = [
        *_differences(data),
        _levels(data),
        _run(data),
        *_rollouts(details_of(data, "rollouts")),
        *_learning(details_of(data, TRAINABILITY)),
        *_error_growth(details),
        *_backwards(data),
        *([] if report.passed else _routers(details)),
        *_maps(data),
        *([_details("Routers", text) for text in _routers(details)] if report.passed else []),
        *_folded(details or details_of(data, TRAINABILITY)),
    ]
    verdict = f'<span class="verdict {"good" if report.passed else "bad"}">{title_of(data)}</span>'
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{shown(data['verdict'])}: {shown(report.candidate)}</title>"
        f"<style>{_style()}</style></head><body><main>"
        f'<header>{verdict}<h1>{name_shown(report.candidate)}</h1><p class="soft">against'
        f" {name_shown(report.reference)}</p></header>"
        f"{''.join(f'<section>{section}</section>' for section in sections)}"
        f"<footer>ckptkit verify, schema {data['schema']}</footer></main></body></html>\n"
    )


def _style() -> str:
    return files("ckptkit.verification.reports").joinpath("report.css").read_text(encoding="utf-8")


def _differences(data: Mapping[str, Any]) -> Iterator[str]:
    """The tensors that differ, by size, and the place where the computations part."""
    rows, parted = difference_rows(data), fed_by(data)
    if not rows and parted is None:
        return
    parts = ["<h2>What differs</h2>"]
    if parted is not None:
        place, tensors = parted
        parts.append(f'<p>The models part at <b class="bad">{shown(place)}</b>, which is fed by</p>')
        parts.append(f'<ul class="names">{"".join(f"<li>{name_shown(name)}</li>" for name in tensors)}</ul>')
    if ranks := guilty_ranks(data):
        parts.append(f'<p>It is held by <b class="bad">{shown(ranks)}</b> of the candidate.</p>')
    if rows:
        parts.append('<p class="soft">Tensors by the size of the difference:</p>')
        parts.append(_wide_table(DIFFERENCES, rows))
    yield "".join(parts)


def _wide_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of a name and figures. On a narrow screen each row is a block, and each figure has its heading."""
    heading = "".join(f"<th>{shown(name.capitalize())}</th>" for name in head)
    body = "".join(
        "<tr>"
        + "".join(
            f'<td data-head="{shown(name.capitalize())}">{name_shown(cell) or "&ndash;"}</td>'
            for name, cell in zip(head, row, strict=True)
        )
        + "</tr>"
        for row in rows
    )
    return f'<table class="wide"><thead><tr>{heading}</tr></thead><tbody>{body}</tbody></table>'


def _run(data: Mapping[str, Any]) -> str:
    """How the verification was made, and what the two sides are."""
    parts = [f"<div><h2>The run</h2>{_facts(run_facts(data))}</div>"]
    parts += [f"<div><h2>{_title(name)}</h2>{_facts(facts)}</div>" for name, facts in side_facts(data)]
    return f'<div class="columns run">{"".join(parts)}</div>'


def _facts(facts: Facts) -> str:
    lines = "".join(f"<dt>{shown(name)}</dt><dd>{name_shown(text)}</dd>" for name, text in facts)
    return f"<dl>{lines}</dl>"


def _levels(data: Mapping[str, Any]) -> str:
    parts = []
    for level in data["levels"]:
        parts.append(
            f'<div class="level"><h2>{_title(level["name"])} <span class="soft">{level["seconds"]:.1f} s</span></h2>'
        )
        items = "".join(
            f'<li class="{"pass" if check["passed"] else "fail"}"><b>{shown(check["name"])}</b>'
            f' <span class="soft">{name_shown(check["summary"])}</span></li>'
            for check in level["checks"]
        )
        parts.append(f'<ul class="checks">{items}</ul>')
        messages = level["details"].get("messages", [])
        if messages:
            lines = "".join(f"<p>{name_shown(line)}</p>" for line in messages)
            parts.append(f'<div class="notes{"" if level["passed"] else " bad"}">{lines}</div>')
        parts.append("</div>")
    for name in data["not_run"]:
        parts.append(
            f'<div class="level"><h2>{_title(name)}</h2>'
            '<ul class="checks"><li class="idle soft">not reached</li></ul></div>'
        )
    if data["messages"]:
        parts.append(f'<div class="notes">{"".join(f"<p>{name_shown(line)}</p>" for line in data["messages"])}</div>')
    return "".join(parts)


def _title(name: str) -> str:
    return shown(name.capitalize())


def _rollouts(details: Mapping[str, Any]) -> Iterator[str]:
    """Figures of an engine's rollouts, the error by position, and the worst tokens."""
    if not details:
        return
    head, rows = rollout_table(details)
    bins, floor = details["curve"], details["floor"]
    places = [str(part["first"]) for part in bins]
    chart = log_chart(
        [Series("mean difference", "a", [part["mean"] for part in bins])],
        places,
        limit=(details["mean_limit"] * floor["mean"], "limit of the mean"),
        mark=_edge(details, bins),
        title="Difference of the log-probabilities by position in the row",
    )
    ends, window = details["prompt_ends"], details["window"]
    edge = f" Layers see at most {window:,} tokens back." if window else ""
    yield f"<h2>The engine and the models</h2>{_wide_table(head, rows)}"
    yield (
        '<h2>Error by position</h2><p class="soft">Mean difference of the log-probabilities of sampled tokens, by'
        f" their position in the row. First prompts end after {ends[0]:,} to {ends[2]:,} tokens, {ends[1]:,} in the"
        f" median.{edge}</p>{_scrolled(chart)}"
    )
    yield _details("The worst tokens", _wide_table(WORST, worst_rows(details)))


def _learning(details: Mapping[str, Any]) -> Iterator[str]:
    """The error of what each step sampled."""
    if not details or not details["errors"]:
        return
    errors = details["errors"]
    chart = log_chart(
        [Series("error", "a", errors)],
        [f"step {step}" for step in range(len(errors))],
        limit=(details["target_error"], "wanted"),
        title="Error of what each step sampled, in tokens",
    )
    final = "not reached" if details["final_error"] is None else f"{details['final_error']:.2f}"
    yield (
        f'<h2>Error by step</h2><p class="soft">Mean distance of the completions from {details["target"]} tokens. Over'
        f" the same prompts and draws it is {details['initial_error']:.2f} before the first step and {final} after the"
        f" last one.</p>{_scrolled(chart)}"
    )
    yield _details("The steps", _wide_table(STEPS, step_rows(details)))


def _edge(details: Mapping[str, Any], bins: Sequence[Mapping[str, Any]]) -> tuple[int, str] | None:
    """The bin in which the sliding window ends, if rows are longer."""
    window = details["window"]
    place = next((number for number, part in enumerate(bins) if part["first"] <= window <= part["last"]), None)
    return None if place is None or not window else (place, "sliding window")


def _error_growth(details: Mapping[str, Any]) -> Iterator[str]:
    states = details.get("hidden_states") or []
    if not states:
        return
    series = [Series("candidate", "a", [state["rms_error"] for state in states])]
    if details.get("noise"):
        series.append(Series("reference itself", "b", [state["noise"] for state in states]))
    places = [state["place"] for state in states]
    chart = log_chart(series, places, mark=_mark(details, places), title="Relative error of the hidden states by layer")
    yield (
        "<h2>Error by layer</h2>"
        f'<p class="soft">RMS error of the hidden states, relative to their size. {_what_ran(details)}</p>'
        f"{_legend(series)}{_scrolled(chart)}"
    )


def _backwards(data: Mapping[str, Any]) -> Iterator[str]:
    """The gradients, and what steps of training added, by layer; and the worst of them by name."""
    for level, what in zip(BACKWARD, ("gradient", "update"), strict=True):
        details = details_of(data, level)
        if not (places := details.get("places")):
            continue
        names, worst = [place["place"] for place in places], worst_place(details)
        series = [Series("error", "a", [place["error"] for place in places])]
        if all(place["ratio"] is not None for place in places):
            series.append(Series("times the reference's own", "b", [place["ratio"] for place in places]))
        exact = level == "gradients" and details["dtype"] in EXACT
        chart = log_chart(
            series,
            names,
            limit=(details["tolerance"], f"tolerance {details['tolerance']:.0e}") if exact else None,
            mark=(names.index(worst), f"wrong in {worst}") if worst in names else None,
            title=f"Error of the worst {what} by layer",
        )
        heading = ("tensor", "largest error", "largest |element|")
        rows = [(one["name"], f"{one['error']:.1e}", f"{one['largest']:.1e}") for one in details["worst"][:SOME]]
        yield (
            f"<h2>{what.capitalize()}s by layer</h2>"
            f'<p class="soft">The worst {what} of each place: its largest error over its largest |element|.'
            f" The candidate ran in {shown(details['dtype'])}.</p>{_legend(series)}"
            f'{_scrolled(chart)}<p class="soft">The worst of {details["tensors"]:,} tensors:</p>'
            f"{_wide_table(heading, rows)}"
        )


def _what_ran(details: Mapping[str, Any]) -> str:
    if details.get("noise"):
        return f"The candidate in {shown(details['dtype'])} against the reference in float32."
    return f"Both sides in {shown(details['dtype'])}."


def _mark(details: Mapping[str, Any], places: Sequence[str]) -> tuple[int, str] | None:
    """Where the models part, among the places of that chart: a part of a layer counts as the layer."""
    location = details.get("location")
    if not location:
        return None
    place = location["place"]
    whole = " ".join(place.split()[:2]) if place.startswith("layer ") else place
    return (places.index(whole), f"parts at {place}") if whole in places else None


def _legend(series: Sequence[Series]) -> str:
    if len(series) < 2:
        return ""
    items = "".join(f'<span><i class="{line.style}"></i>{shown(line.name)}</span>' for line in series)
    return f'<div class="legend">{items}</div>'


def _scrolled(drawing: str) -> str:
    return f'<div class="scroll">{drawing}</div>'


def _positions(details: Mapping[str, Any]) -> Iterator[str]:
    agreement = details.get("agreement")
    if not agreement:
        return
    exact = not details.get("noise")
    limit = (details["tolerance"], f"tolerance {details['tolerance']:.0e}") if exact else None
    values = [value for row in agreement["per_position"] for value in row]
    places = [f"row {row}, {at}" for row, line in enumerate(agreement["per_position"]) for at in range(len(line))]
    row, at = agreement["worst"]
    chart = log_chart([Series("error", "a", values)], places, limit=limit, title="Error of the logits by position")
    yield (
        '<p class="soft">Largest difference of two logits at each position of each row, over the largest |logit|'
        f" ({agreement['max_abs_logit']:.1f}). The worst is in row {row} at position {at}.</p>{_scrolled(chart)}"
    )


def _routers(details: Mapping[str, Any]) -> Iterator[str]:
    routing = details.get("routing")
    if not routing:
        return
    layers = routing["layers"]
    chart = log_chart(
        [Series("router logits", "a", [layer["relative_error"] for layer in layers])],
        [f"layer {layer['layer']}" for layer in layers],
        limit=None if details.get("noise") else (routing["tolerance"], f"tolerance {routing['tolerance']:.0e}"),
        title="Error of the router logits by layer",
    )
    ties, beyond = (sum(layer[key] for layer in layers) for key in ("near_ties", "disagreements"))
    yield (
        '<h2>Routers</h2><p class="soft">Largest error of the router logits of each layer, over the largest of them.'
        f" Of {routing['tokens'] * len(layers):,} choices of experts {ties} differ within the noise and {beyond} beyond"
        f" it.</p>{_scrolled(chart)}"
    )


def _maps(data: Mapping[str, Any]) -> Iterator[str]:
    """The map of every side with several ranks. That of the reference is folded: nothing on it is guilty."""
    guilty = guilty_places(data)
    for name, side in data["sides"].items():
        if len(side["ranks"]) == 1:
            continue
        marked = guilty if name == "candidate" else set()
        dots = " A dot marks a layer with experts." if side["moe_layers"] else ""
        marks = ' <b class="bad">What differs is outlined.</b>' if marked else ""
        text = (
            f'<p class="soft">The {name}: {shown(side["architecture"])}, {side["parameters"]:,} parameters, as'
            f" {shown(side['format'])} on {shown(side['grid']['name'])}. Colours are pipeline stages.{dots}{marks}</p>"
            f"{_scrolled(rank_map(side, marked))}"
        )
        heading = "Which rank holds what"
        yield f"<h2>{heading}</h2>{text}" if name == "candidate" else _details(f"{heading}: the {name}", text)


def _folded(details: Mapping[str, Any]) -> Iterator[str]:
    """What is of interest only now and then."""
    for text in _positions(details):
        yield _details("Error by position", text)
    tables = [*_modules(details), *_seconds(details)]
    if tables:
        yield _details("Modules and times", f'<div class="columns">{"".join(tables)}</div>')


def _details(title: str, text: str) -> str:
    return f"<details><summary>{shown(title)}</summary>{text}</details>"


def _modules(details: Mapping[str, Any]) -> Iterator[str]:
    for whose, key in (("megatron-core's", "megatron_modules"), ("ckptkit's", "own_modules")):
        if found := details.get(key):
            rows = ((name.rpartition(".")[2], f"{count:,}") for name, count in found.items())
            yield _table(("module", "how many"), rows, whose)


def _seconds(details: Mapping[str, Any]) -> Iterator[str]:
    if seconds := details.get("seconds"):
        yield _table(("phase", "seconds"), ((name, f"{value:.1f}") for name, value in seconds.items()), "time")


def _table(head: tuple[str, str], rows: Iterable[tuple[str, str]], title: str) -> str:
    body = "".join(f'<tr><td>{name_shown(name)}</td><td class="n">{shown(value)}</td></tr>' for name, value in rows)
    heading = "".join(f"<th>{shown(name)}</th>" for name in head)
    return f"<div><h2>{shown(title.capitalize())}</h2><table><tr>{heading}</tr>{body}</table></div>"
