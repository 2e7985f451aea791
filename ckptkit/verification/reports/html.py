"""The report as one HTML page that needs nothing else: no scripts, no fonts, no network."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from typing import Any

from ckptkit.verification.reports.charts import Series, log_chart, rank_map, shown
from ckptkit.verification.reports.report import VerificationReport


def html_page(report: VerificationReport) -> str:
    """The whole page."""
    data = report.to_dict()
    details: dict[str, Any] = next((level["details"] for level in data["levels"] if level["name"] == "logits"), {})
    sections = [
        _levels(data),
        *_error_growth(details),
        *_positions(details),
        *_routers(details),
        *_maps(data),
        *_facts(details),
    ]
    good = report.passed
    verdict = (
        f'<span class="verdict {"good" if good else "bad"}">{"Same model" if good else "The models differ"}</span>'
    )
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{shown(data['verdict'])}: {shown(report.candidate)}</title>"
        f"<style>{_style()}</style></head><body><main>"
        f'<header>{verdict}<h1>{shown(report.candidate)}</h1><p class="soft path">against {shown(report.reference)}'
        f"</p></header>{''.join(f'<section>{section}</section>' for section in sections)}"
        f"<footer>{_footer(data, details)}</footer></main></body></html>\n"
    )


def _style() -> str:
    return files("ckptkit.verification.reports").joinpath("report.css").read_text(encoding="utf-8")


def _footer(data: Mapping[str, Any], details: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in details.get("versions", {}).items())
    return shown(f"ckptkit verify, schema {data['schema']}" + (f"; {versions}" if versions else ""))


def _levels(data: Mapping[str, Any]) -> str:
    parts = []
    for level in data["levels"]:
        parts.append(
            f'<div class="level"><h2>{_title(level["name"])} <span class="soft">{level["seconds"]:.1f} s</span></h2>'
        )
        items = "".join(
            f'<li class="{"pass" if check["passed"] else "fail"}"><b>{shown(check["name"])}</b>'
            f' <span class="soft">{shown(check["summary"])}</span></li>'
            for check in level["checks"]
        )
        parts.append(f'<ul class="checks">{items}</ul>')
        messages = level["details"].get("messages", [])
        if messages:
            lines = "".join(f"<p>{shown(line)}</p>" for line in messages)
            parts.append(f'<div class="notes{"" if level["passed"] else " bad"}">{lines}</div>')
        parts.append("</div>")
    for name in data["not_run"]:
        parts.append(
            f'<div class="level"><h2>{_title(name)}</h2>'
            '<ul class="checks"><li class="idle soft">not reached</li></ul></div>'
        )
    if data["messages"]:
        parts.append(f'<div class="notes">{"".join(f"<p>{shown(line)}</p>" for line in data["messages"])}</div>')
    return "".join(parts)


def _title(name: str) -> str:
    return shown(name.capitalize())


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
        f"{_legend(series)}{chart}"
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
        "<h2>Error by position</h2>"
        '<p class="soft">Largest difference of two logits at each position of each row, over the largest |logit|'
        f" ({agreement['max_abs_logit']:.1f}). The worst is in row {row} at position {at}.</p>{chart}"
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
        f" it.</p>{chart}"
    )


def _maps(data: Mapping[str, Any]) -> Iterator[str]:
    for name, side in data["sides"].items():
        if len(side["ranks"]) > 1:
            dots = " A dot marks a layer with experts." if side["moe_layers"] else ""
            yield (
                f'<h2>Which rank holds what</h2><p class="soft">The {name}: {shown(side["architecture"])},'
                f" {side['parameters']:,} parameters, as {shown(side['format'])} on {shown(side['grid']['name'])}."
                f" Colours are pipeline stages.{dots}</p>"
                f'<div class="scroll">{rank_map(side)}</div>'
            )


def _facts(details: Mapping[str, Any]) -> Iterator[str]:
    modules = [("megatron-core's", details.get("megatron_modules")), ("ckptkit's", details.get("own_modules"))]
    tables = [
        _table(
            ("module", "how many"), ((name.rpartition(".")[2], f"{count:,}") for name, count in found.items()), whose
        )
        for whose, found in modules
        if found
    ]
    seconds = details.get("seconds")
    if seconds:
        tables.append(_table(("phase", "seconds"), ((name, f"{value:.1f}") for name, value in seconds.items()), "time"))
    if tables:
        yield f'<div class="columns">{"".join(tables)}</div>'


def _table(head: tuple[str, str], rows: Any, title: str) -> str:
    body = "".join(f'<tr><td>{shown(name)}</td><td class="n">{value}</td></tr>' for name, value in rows)
    heading = "".join(f"<th>{shown(name)}</th>" for name in head)
    return f"<div><h2>{shown(title.capitalize())}</h2><table><tr>{heading}</tr>{body}</table></div>"
