"""Prints results as text."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from ckptkit.cli.tables import SHOWN, cut, facts, line, sentences, table
from ckptkit.sizes import human_size, three_digits

if TYPE_CHECKING:
    from ckptkit.conversion.architectures import Architecture
    from ckptkit.conversion.choosing import Choices
    from ckptkit.conversion.execution import ConversionResult
    from ckptkit.deltas.make import MadeDelta
    from ckptkit.inspection.delta_summary import DeltaInspection
    from ckptkit.inspection.differences import Differences, Structure, TensorDifference
    from ckptkit.inspection.hashing import Hashes
    from ckptkit.inspection.summary import Inspection
    from ckptkit.inspection.validation import Validation
    from ckptkit.runs.watch import Watched
    from ckptkit.verification.environment.disk import Disk
    from ckptkit.verification.environment.summary import Ability, Environment
    from ckptkit.verification.reports.report import VerificationReport

GOOD, BAD = "bold green", "bold red"


def human_count(count: int) -> str:
    """A count with three digits: `135 M`."""
    value, unit = float(count), ""
    for unit in ("", "K", "M", "B", "T"):
        if value < 999.5 or unit == "T":
            break
        value /= 1000
    return str(count) if not unit else f"{three_digits(value)} {unit}"


# conversion -----------------------------------------------------------------------------------------------------------


def conversion(result: ConversionResult, console: Console) -> None:
    """The plan of a conversion, its losses and notes, and its outcome."""
    source, target = result.source, result.target
    title = f"{source['architecture']} ({source['family']}): {_layout(source)} -> {_layout(target)}"
    console.print(line((title, "bold")))
    console.print(line((f"{source['path']} -> {target['path']}", "dim")), soft_wrap=True)
    rows = [
        (file["path"], f"{file['tensors']:,}" if file["tensors"] else "", human_size(file["bytes"]))
        for file in result.files
    ]
    console.print(table(("File", "Tensors", "Size"), rows))
    for path, sha256 in result.hashes.items():
        console.print(line(f"{sha256}  {path}"), soft_wrap=True)
    console.print(facts(_conversion_facts(result)))
    sentences(console, result.lossy, "lossy", "bold yellow")
    sentences(console, [_dropped(record) for record in result.dropped], "dropped", "cyan")
    sentences(console, result.notes, "note", "cyan")
    if result.likeness is not None:
        sentences(console, _likeness(result.likeness), "like", "cyan")
    console.print(_closing_line(result))
    if flags := target.get("megatron_flags"):
        console.print(line("Megatron-LM builds this model with:"))
        megatron_flags(flags, console)


def choices(found: Choices, console: Console) -> None:
    """What a checkpoint is, and what it can become."""
    layout = _layout({"format": found.format, "grid": found.grid})
    console.print(line((f"{found.architecture} ({found.family}), {layout}", "bold")))
    console.print(line((found.path, "dim")), soft_wrap=True)
    for one in found.choices:
        console.print()
        console.print(line((f"--to {one.to}", "bold"), f": {one.what}"), soft_wrap=True)
        console.print(line(f"  {one.command}"), soft_wrap=True)
    console.print()
    sentences(console, found.notes, "note", "cyan")


def _likeness(likeness: Mapping[str, Any]) -> list[str]:
    """What became of the tensors of a reference, those that moved most first."""
    new = sorted(likeness["new_scales"], key=lambda record: -float(record["relative_rms"] or 0))
    same, fitting = likeness["same"], len(likeness["old_scales"])
    if not new and not fitting:
        return [f"all {same:,} quantised tensors are unchanged, and keep their codes and scales"]
    found = [
        f"of {same + fitting + len(new):,} quantised tensors {same:,} are unchanged, and keep their codes and scales;"
        f" {fitting:,} have new codes for their old scales; {len(new):,} have new scales"
    ]
    found += [_moved(one) for one in new[:5]]
    return [*found, f"{len(new) - 5:,} more are in --json"] if len(new) > 5 else found


def _moved(record: Mapping[str, Any]) -> str:
    """How far a tensor moved that got new scales."""
    if record["relative_rms"] is None:
        return f"{record['tensor']} has new scales; how far it moved, only the original's codes tell"
    moved, most = record["relative_rms"], record["max_abs_difference"]
    return f"{record['tensor']} moved by {moved:.3g} of its RMS, at most {most:.3g}"


def _layout(side: dict[str, Any]) -> str:
    return side["format"] if side["grid"] == "TP1 x PP1" else f"{side['format']} {side['grid']}"


def _conversion_facts(result: ConversionResult) -> list[tuple[str, str]]:
    total = result.bytes_total
    disk = f"{human_size(result.disk_needed)} needed"
    if result.disk_free is not None:
        short = result.disk_needed - result.disk_free
        disk += f", {human_size(result.disk_free)} free" + (f": {human_size(short)} short" if short > 0 else "")
    return [
        ("total", f"{human_size(total)} in {len(result.files)} files"),
        ("copied through", _share(result.bytes_through, total)),
        ("rearranged", _share(result.bytes_rearranged, total)),
        ("memory", f"at most {human_size(result.memory_needed)}"),
        ("disk" if result.disk_free is not None else "store", disk),
        ("coverage", ", ".join(f"{count:,} {what}" for what, count in result.coverage.items())),
    ]


def _share(part: int, total: int) -> str:
    return f"{human_size(part)} ({part / total:.0%})" if total else human_size(part)


def _dropped(record: dict[str, Any]) -> str:
    """A line about parts that are stored, but not used by the model, and therefore dropped."""
    size = record["max_abs_difference"]
    moved = "not measured" if size is None else f"{size:g}" + (f" in {record['where']}" if record["where"] else "")
    return f"{record['what']}: {record['parts']:,} parts, moved at most by {moved}"


def _closing_line(result: ConversionResult) -> Text:
    seconds = result.seconds
    if result.dry_run:
        return line((f"Planned in {seconds:.2f} s. Nothing was written.", "bold"))
    copying, fitted = seconds - result.seconds_fitting, ""
    if result.seconds_fitting:
        fitted = f"Fitted the adapter in {result.seconds_fitting:.2f} s. "
    rate = human_size(int(result.bytes_total / copying)) if copying > 0 else "-"
    return line((f"{fitted}Wrote {human_size(result.bytes_total)} in {copying:.2f} s ({rate}/s).", GOOD))


def made_delta(result: MadeDelta, console: Console) -> None:
    """What a new delta holds, and how large it is."""
    console.print(line((f"{result.new['architecture']} ({result.new['family']}): delta", "bold")))
    for name, side in (("OLD", result.old), ("NEW", result.new)):
        console.print(line((f"{name}  ", "bold"), side["path"], (f"  {_layout(side)}", "dim")), soft_wrap=True)
    _largest_changes(result.tensors, console)
    for path, sha256 in result.hashes.items():
        console.print(line(f"{sha256}  {path}"), soft_wrap=True)
    about = [
        ("tensors", _codings(result.codings)),
        ("changed", f"{_share_of(result.changed, result.elements)} of {human_count(result.elements)} elements"),
        ("total", f"{human_size(result.bytes_total)} for {human_size(result.bytes_new)} of weights"),
    ]
    console.print(facts(about))
    sentences(console, result.notes, "note", "cyan")
    if result.dry_run:
        console.print(line((f"Planned in {result.seconds:.2f} s. Nothing was written.", "bold")))
    else:
        console.print(line((f"Wrote {human_size(result.bytes_total)} in {result.seconds:.2f} s.", GOOD)))


def _largest_changes(tensors: Sequence[dict[str, Any]], console: Console) -> None:
    """A table of the tensors that take most of a delta."""
    most = sorted(tensors, key=lambda item: (-item["stored"], item["name"]))
    rows = [
        (item["name"], item["coding"], human_size(item["bytes"]), human_size(item["stored"])) for item in most[:SHOWN]
    ]
    if rows:
        console.print(table(("Tensor", "Coding", "Size", "In the delta"), rows))
    if (more := len(most) - SHOWN) > 0:
        console.print(line((f"... and {more:,} more tensors (--json has all)", "dim")))


def _codings(codings: dict[str, int]) -> str:
    return ", ".join(f"{count:,} {coding}" for coding, count in codings.items())


def _share_of(part: int, total: int) -> str:
    return f"{part / total:.3%}" if total else "0%"


# looking --------------------------------------------------------------------------------------------------------------


def inspection(result: Inspection, console: Console) -> None:
    """The content of a checkpoint, by layer role."""
    console.print(line((f"{result.architecture} ({result.family}), {result.format}, {result.grid}", "bold")))
    console.print(line((result.path, "dim")), soft_wrap=True)
    rows = [
        (role["role"], f"{role['tensors']:,}", human_count(role["parameters"]), human_size(role["bytes"]))
        for role in result.roles
    ]
    console.print(table(("Role", "Tensors", "Parameters", "Size"), rows))
    about = [
        ("parameters", f"{result.parameters:,} ({human_count(result.parameters)})"),
        ("size", human_size(result.bytes) + (", as read" if result.quantised is not None else "")),
        ("dtypes", ", ".join(f"{name} {human_size(size)}" for name, size in result.dtypes.items())),
    ]
    if result.quantised is not None:
        about.append(("quantised", _quantised(result.quantised)))
    if result.adapter is not None:
        about += [(name, _counted(value)) for name, value in result.adapter.items() if value]
    console.print(facts(about))
    sentences(console, result.notes, "note", "cyan")


def delta(result: DeltaInspection, console: Console) -> None:
    """What is in a delta."""
    console.print(line((f"{result.architecture}, delta", "bold")))
    console.print(line((result.path, "dim")), soft_wrap=True)
    _largest_changes([item for item in result.tensors if item["coding"] != "unchanged"], console)
    tiles = ", ".join(f"{count:,} {coding}" for coding, count in result.tiles.items())
    about = [
        ("old", result.old),
        ("new", result.new),
        ("tensors", _codings(result.codings)),
        ("tiles", tiles or "none"),
        ("size", f"{human_size(result.bytes)} for {human_size(result.bytes_new)} of weights"),
    ]
    console.print(facts(about))


def _quantised(quantised: Mapping[str, Any]) -> str:
    """What is quantised, how, and the size as numbers."""
    stored, read = human_size(quantised["bytes_stored"]), human_size(quantised["bytes_read"])
    sizes = f"{stored} stored, {read} read as {quantised['read_as']}"
    return f"{quantised['tensors']:,} tensors, {quantised['scheme']}: {sizes}"


def _counted(value: Any) -> str:
    """A fact about an adapter: a number, a word, or values with the number of layers that have each."""
    if isinstance(value, dict):
        return ", ".join(f"{name} ({count:,})" for name, count in value.items())
    return ", ".join(value) if isinstance(value, list) else f"{value:,}" if isinstance(value, int) else str(value)


def megatron_flags(words: Sequence[str], console: Console) -> None:
    """A command line, as a shell reads it."""
    console.print(line(shlex.join(words)), soft_wrap=True)


def differences(result: Differences, console: Console) -> None:
    """The differences between two checkpoints."""
    for name, side in (("A", result.a), ("B", result.b)):
        about = f"  {side['architecture']}, {side['format']}, {side['grid']}"
        console.print(line((f"{name}  ", "bold"), side["path"], (about, "dim")), soft_wrap=True)
    sentences(console, cut(_structure(result.structure)), "structure", "bold yellow")
    sentences(console, cut(result.inconsistent), "inconsistent", "bold yellow")
    if result.tensors:
        headers = ("Tensor", "Differ", "Of", "Largest |A-B|", "First", "NaN", "Inf")
        console.print(table(headers, map(_gap, result.tensors[:SHOWN])))
        if (more := len(result.tensors) - SHOWN) > 0:
            console.print(line((f"... and {more:,} more tensors (--json has all)", "dim")))
    console.print(_difference_line(result))


def _structure(structure: Structure) -> list[str]:
    """The differences in the headers, as sentences."""
    return [
        *structure.config,
        *(f"only A has {name}" for name in structure.only_in_a),
        *(f"only B has {name}" for name in structure.only_in_b),
        *(f"{name} is {list(a)} in A, {list(b)} in B" for name, (a, b) in structure.shapes.items()),
        *(f"{name} is {a} in A, {b} in B" for name, (a, b) in structure.dtypes.items()),
    ]


def _gap(item: TensorDifference) -> tuple[str, ...]:
    def both(pair: Sequence[int]) -> str:
        return f"{pair[0]:,} / {pair[1]:,}" if any(pair) else ""

    return (
        item.name,
        f"{item.differing:,}",
        f"{item.elements:,}",
        "not comparable" if item.largest is None else f"{item.largest:.3g}",
        "" if item.first is None else f"{item.first:,}",
        both(item.nan),
        both(item.inf),
    )


def _difference_line(result: Differences) -> Text:
    if not result.values_compared:
        what = "the headers agree; values were not compared" if result.same else "the headers differ"
    else:
        seconds, size = result.seconds, result.bytes
        rate = f", {human_size(size)} in {seconds:.2f} s" + (
            f" ({human_size(int(size / seconds))}/s)" if seconds else ""
        )
        what = f"{result.equal:,} of {result.compared:,} tensors are equal{rate}"
    return line(_answer(result.same), f": {what}")


def validation(result: Validation, console: Console) -> None:
    """Whether a checkpoint is sound, question by question."""
    about = ", ".join(str(fact) for fact in (result.architecture, result.format, result.grid) if fact)
    console.print(line((result.path, "bold"), (f"  {about}", "dim")), soft_wrap=True)
    rows = [(check.name, "ok" if check.passed else "WRONG", check.summary) for check in result.checks]
    rows += [(name, "not asked", "") for name in result.not_asked]
    console.print(table(("Check", "Answer", "About"), rows, numbers=False))
    for check in result.checks:
        sentences(console, cut(check.problems), f"wrong ({check.name})", BAD)
        sentences(console, cut(check.warnings), f"odd ({check.name})", "yellow")
    sentences(console, result.notes, "note", "cyan")
    console.print(line(("sound", GOOD) if result.passed else ("damaged or inconsistent", BAD)))


def hashes(result: Hashes, console: Console) -> None:
    """Hashes as lines that `diff` and `grep` can take; with `--only tensors`, the same lines for every layout."""
    for tensor in result.tensors:
        text = f"{tensor.sha256}  {tensor.name}  {tensor.dtype}{list(tensor.shape)}"
        console.print(line(text), soft_wrap=True)
    if result.model is not None:
        console.print(line((f"{result.model}  (model)", "bold")), soft_wrap=True)
    for file in result.files:
        console.print(line(f"{file.sha256}  {file.path}"), soft_wrap=True)


def architectures(supported: Iterable[Architecture], console: Console) -> None:
    """The supported architectures."""
    rows = [(item.architecture, item.family, ", ".join(item.formats)) for item in supported]
    console.print(table(("Architecture", "Family", "Formats"), rows, numbers=False))


# verification ---------------------------------------------------------------------------------------------------------


def watched(found: Watched, console: Console) -> None:
    """What became of the iterations of a run."""
    rows = [(entry.folder, entry.state, entry.said) for _, entry in sorted(found.iterations.items())]
    console.print(table(("Iteration", "State", "Because"), rows, numbers=False))


def environment(found: Environment, console: Console) -> None:
    """What works here."""
    console.print(
        facts(
            [
                ("ckptkit", f"{found.ckptkit}, Python {found.python}, {found.platform}"),
                (
                    "devices",
                    ", ".join(f"{one['name']} ({human_size(one['memory'])})" for one in found.devices) or "CPU",
                ),
                ("launchers", ", ".join(name for name, place in found.launchers.items() if place) or "none found"),
                *_disk(found.disk),
            ]
        )
    )
    rows = [(one.name, one.version or "-", one.problem or "ok", one.purpose) for one in found.packages]
    console.print(table(("Package", "Version", "State", "For"), rows, numbers=False))
    answers = [(one.commands, "works" if one.works else _reasons(one)) for one in found.abilities]
    console.print(table(("Command", "Here"), answers, numbers=False))
    lines = dict.fromkeys(one.install for one in found.abilities if one.install)
    sentences(console, lines, "to install", "yellow")


def _reasons(ability: Ability) -> str:
    """Why something does not work."""
    missing = [f"needs {', '.join(ability.missing)}"] if ability.missing else []
    return "; ".join([*missing, *ability.problems])


def _disk(disk: Disk | None) -> list[tuple[str, str]]:
    if disk is None:
        return []
    rates = ", ".join(
        f"{human_size(int(rate))}/s {verb}" for rate, verb in ((disk.write, "written"), (disk.read, "read"))
    )
    return [("disk", f"{disk.folder} ({disk.filesystem}): {rates}, {human_size(disk.free)} free")]


def verification(report: VerificationReport, console: Console) -> None:
    """The answer of every level, and the reason."""
    from ckptkit.verification.reports.report import verdict_of

    console.print(line((f"{report.candidate} against {report.reference}", "bold")), soft_wrap=True)
    rows = [
        (level.name, word if level.passed else word.upper(), "\n".join([level.summary, *level.messages]))
        for level in report.levels
        for word in [verdict_of([level.name], level.passed)]
    ]
    rows += [(name, "not asked", "") for name in report.not_run]
    console.print(table(("Level", "Answer", "Because"), rows, numbers=False))
    sentences(console, report.messages, "note", "cyan")
    console.print(line((report.verdict, GOOD if report.passed else BAD)))


def _answer(same: bool) -> tuple[str, str]:
    return ("same", GOOD) if same else ("differs", BAD)
