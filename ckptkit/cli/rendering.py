"""Results as people read them: tables and sizes. Takes the same dictionaries that `--json` prints."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

SHOWN = 40
"""Lines of one kind that are shown."""

SIZE_UNITS = ("B", "kB", "MB", "GB", "TB", "PB")


def human_size(size: int) -> str:
    """Bytes with three digits and a decimal unit: `269 MB`."""
    value = float(size)
    for unit in SIZE_UNITS:
        if value < 999.5 or unit == SIZE_UNITS[-1]:
            break
        value /= 1000
    return f"{size} B" if unit == "B" else f"{_three_digits(value)} {unit}"


def human_count(count: int) -> str:
    """A count with three digits: `135 M`."""
    value, unit = float(count), ""
    for unit in ("", "K", "M", "B", "T"):
        if value < 999.5 or unit == "T":
            break
        value /= 1000
    return str(count) if not unit else f"{_three_digits(value)} {unit}"


def conversion(result: dict[str, Any], console: Console) -> None:
    """The plan of a conversion, and what became of it."""
    console.print(_headline(result))
    console.print(_files(result))
    console.print(_facts(_conversion_facts(result)))
    _sentences(console, result["lossy"], "lossy", "bold yellow")
    _sentences(console, [_dropped(record) for record in result["dropped"]], "dropped", "cyan")
    _sentences(console, result["notes"], "note", "cyan")
    console.print(_closing_line(result))


def _dropped(record: dict[str, Any]) -> str:
    """What was stored, is not used by the model, and stays behind."""
    size = record["max_abs_difference"]
    moved = "not measured" if size is None else f"{size:g}" + (f" in {record['where']}" if record["where"] else "")
    return f"{record['what']}: {record['parts']:,} parts, moved at most by {moved}"


def inspection(result: dict[str, Any], console: Console) -> None:
    """What a checkpoint holds, by layer role."""
    title = f"{result['architecture']} ({result['family']}), {result['format']}, {result['grid']}"
    console.print(Text(title, style="bold"))
    console.print(Text(result["path"], style="dim"), soft_wrap=True)
    rows = [
        (role["role"], f"{role['tensors']:,}", human_count(role["parameters"]), human_size(role["bytes"]))
        for role in result["roles"]
    ]
    console.print(_table(("Role", "Tensors", "Parameters", "Size"), rows))
    dtypes = ", ".join(f"{name} {human_size(size)}" for name, size in result["dtypes"].items())
    facts = [
        ("parameters", f"{result['parameters']:,} ({human_count(result['parameters'])})"),
        ("size", human_size(result["bytes"])),
        ("dtypes", dtypes),
    ]
    console.print(_facts(facts))
    _sentences(console, result["notes"], "note", "cyan")


def differences(result: dict[str, Any], console: Console) -> None:
    """In what two checkpoints differ."""
    for name in ("a", "b"):
        side = result[name]
        about = f"{side['architecture']}, {side['format']}, {side['grid']}"
        console.print(Text.assemble((f"{name.upper()}  ", "bold"), side["path"], (f"  {about}", "dim")), soft_wrap=True)
    _sentences(console, _cut(_structure(result["structure"])), "structure", "bold yellow")
    _sentences(console, _cut(result["inconsistent"]), "inconsistent", "bold yellow")
    if result["tensors"]:
        console.print(
            _table(("Tensor", "Differ", "Of", "Largest |A-B|", "First", "NaN", "Inf"), _gaps(result["tensors"]))
        )
        if len(result["tensors"]) > SHOWN:
            console.print(
                Text(f"... and {len(result['tensors']) - SHOWN:,} tensors more (--json has all)", style="dim")
            )
    console.print(_difference_line(result))


def validation(result: dict[str, Any], console: Console) -> None:
    """Whether a checkpoint is sound, question by question."""
    about = ", ".join(str(result[key]) for key in ("architecture", "format", "grid") if result[key])
    console.print(Text.assemble((result["path"], "bold"), (f"  {about}", "dim")), soft_wrap=True)
    rows = [(check["name"], "ok" if check["passed"] else "WRONG", check["summary"]) for check in result["checks"]]
    rows += [(name, "not asked", "") for name in result["not_asked"]]
    console.print(_table(("Check", "Answer", "About"), rows, numbers=False))
    for check in result["checks"]:
        _sentences(console, _cut(check["problems"]), f"wrong ({check['name']})", "bold red")
        _sentences(console, _cut(check["warnings"]), f"odd ({check['name']})", "yellow")
    _sentences(console, result["notes"], "note", "cyan")
    sound = result["passed"]
    console.print(Text("sound" if sound else "damaged or inconsistent", style="bold green" if sound else "bold red"))


def hashes(result: dict[str, Any], console: Console) -> None:
    """Hashes as lines that `diff` and `grep` can take; with `--only tensors`, the same lines for every layout."""
    for item in result["tensors"]:
        console.print(Text(f"{item['sha256']}  {item['name']}  {item['dtype']}{list(item['shape'])}"), soft_wrap=True)
    if result["model"] is not None:
        console.print(Text(f"{result['model']}  (model)", style="bold"), soft_wrap=True)
    for item in result["files"]:
        console.print(Text(f"{item['sha256']}  {item['path']}"), soft_wrap=True)


def architectures(supported: Iterable[dict[str, Any]], console: Console) -> None:
    """The supported architectures."""
    rows = [(item["architecture"], item["family"], ", ".join(item["formats"])) for item in supported]
    console.print(_table(("Architecture", "Family", "Formats"), rows, numbers=False))


def _structure(structure: dict[str, Any]) -> list[str]:
    """What differs in the headers, as sentences."""
    shapes, dtypes = structure["shapes"].items(), structure["dtypes"].items()
    return [
        *structure["config"],
        *(f"only A has {name}" for name in structure["only_in_a"]),
        *(f"only B has {name}" for name in structure["only_in_b"]),
        *(f"{name} is {list(a)} in A, {list(b)} in B" for name, (a, b) in shapes),
        *(f"{name} is {a} in A, {b} in B" for name, (a, b) in dtypes),
    ]


def _gaps(tensors: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    def both(pair: Sequence[int]) -> str:
        return f"{pair[0]:,} / {pair[1]:,}" if any(pair) else ""

    return [
        (
            item["name"],
            f"{item['differing']:,}",
            f"{item['elements']:,}",
            "not comparable" if item["largest"] is None else f"{item['largest']:.3g}",
            "" if item["first"] is None else f"{item['first']:,}",
            both(item["nan"]),
            both(item["inf"]),
        )
        for item in tensors[:SHOWN]
    ]


def _difference_line(result: dict[str, Any]) -> Text:
    if not result["values_compared"]:
        what = "the headers agree; values were not compared" if result["same"] else "the headers differ"
    else:
        seconds, size = result["seconds"], result["bytes"]
        rate = f", {human_size(size)} in {seconds:.2f} s" + (
            f" ({human_size(int(size / seconds))}/s)" if seconds else ""
        )
        what = f"{result['equal']:,} of {result['compared']:,} tensors are equal{rate}"
    return Text.assemble(
        ("same" if result["same"] else "differs", "bold green" if result["same"] else "bold red"), f": {what}"
    )


def _cut(sentences: Sequence[str]) -> list[str]:
    """As many as people read."""
    more = len(sentences) - SHOWN
    return [*sentences[:SHOWN], *([f"... and {more:,} more (--json has all)"] if more > 0 else [])]


def _headline(result: dict[str, Any]) -> Text:
    source, target = result["source"], result["target"]
    left, right = (_layout(side) for side in (source, target))
    return Text.assemble(
        (f"{source['architecture']} ({source['family']}): {left} -> {right}\n", "bold"),
        (f"{source['path']} -> {target['path']}", "dim"),
    )


def _layout(side: dict[str, Any]) -> str:
    return side["format"] if side["grid"] == "TP1 x PP1" else f"{side['format']} {side['grid']}"


def _files(result: dict[str, Any]) -> Table:
    hashes = result.get("hashes") or {}
    rows = [
        (
            file["path"],
            f"{file['tensors']:,}" if file["tensors"] else "",
            human_size(file["bytes"]),
            *([hashes.get(file["path"], "")] if hashes else []),
        )
        for file in result["files"]
    ]
    return _table(("File", "Tensors", "Size", *(["SHA-256"] if hashes else [])), rows)


def _conversion_facts(result: dict[str, Any]) -> list[tuple[str, str]]:
    total = result["bytes_total"]
    short = result["disk_needed"] - result["disk_free"]
    disk = f"{human_size(result['disk_needed'])} needed, {human_size(result['disk_free'])} free"
    return [
        ("total", f"{human_size(total)} in {len(result['files'])} files"),
        ("copied through", _share(result["bytes_through"], total)),
        ("rearranged", _share(result["bytes_rearranged"], total)),
        ("memory", f"at most {human_size(result['memory_needed'])}"),
        ("disk", f"{disk}: {human_size(short)} short" if short > 0 else disk),
        ("coverage", ", ".join(f"{count:,} {what}" for what, count in result["coverage"].items())),
    ]


def _closing_line(result: dict[str, Any]) -> Text:
    seconds = result["seconds"]
    if result["dry_run"]:
        return Text(f"Planned in {seconds:.2f} s. Nothing was written.", style="bold")
    rate = human_size(int(result["bytes_total"] / seconds)) if seconds > 0 else "-"
    return Text(f"Wrote {human_size(result['bytes_total'])} in {seconds:.2f} s ({rate}/s).", style="bold green")


def _table(headers: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: bool = True) -> Table:
    """A table whose columns after the first hold numbers, unless told otherwise."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for index, header in enumerate(headers):
        right = numbers and index > 0
        table.add_column(header, justify="right" if right else "left", no_wrap=right, overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def _facts(facts: Iterable[tuple[str, str]]) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts:
        table.add_row(Text(name), Text(value))
    return table


def _sentences(console: Console, sentences: Iterable[str], label: str, style: str) -> None:
    for sentence in sentences:
        console.print(Text.assemble((f"{label}: ", style), sentence), soft_wrap=True)


def _share(part: int, total: int) -> str:
    return f"{human_size(part)} ({part / total:.0%})" if total else human_size(part)


def _three_digits(value: float) -> str:
    decimals = 2 if value < 9.995 else 1 if value < 99.95 else 0
    return f"{value:.{decimals}f}"
