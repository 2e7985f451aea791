"""What every report says beside its answers, as texts: the facts of the run, what differs, and which ranks hold it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ckptkit.verification.reports.placement import place_of
from ckptkit.verification.reports.report import TRAINABILITY
from ckptkit.verification.run_options import BACKWARD

Facts = list[tuple[str, str]]
"""Names and texts. The texts may come out of files, so whoever writes them escapes them."""
TITLES = {
    "same": "Same model",
    "differs": "The models differ",
    "learns": "The model learns",
    "does not learn": "The model does not learn",
}
"""Verdict -> the same for a heading."""
DIFFERENCES = ("tensor", "layer", "largest difference", "elements", "ranks")
"""Headings of `difference_rows`."""
SOME_RANKS = 16


def details_of(data: Mapping[str, Any], level: str) -> dict[str, Any]:
    """The details of a level of a report as JSON; empty if it has no answer."""
    return next((found["details"] for found in data["levels"] if found["name"] == level), {})


def title_of(data: Mapping[str, Any]) -> str:
    """The verdict in words."""
    return TITLES[data["verdict"]]


def passed(data: Mapping[str, Any]) -> bool:
    """Whether the verdict is the good one."""
    return data["verdict"] in ("same", "learns")


def run_facts(data: Mapping[str, Any]) -> Facts:
    """How the verification was made."""
    logits, rollouts, learnt = (details_of(data, level) for level in ("logits", "rollouts", TRAINABILITY))
    given = [
        ("command", data["command"] or ""),
        ("date", data["started"]),
        ("device", _device(logits or learnt) or rollouts.get("device", "")),
        ("dtype", _dtype(logits) or rollouts.get("dtype", "") or learnt.get("dtype", "")),
        ("tokens", _tokens(logits)),
        ("rollouts", _rollouts(rollouts)),
        ("run", _learnt(learnt)),
        ("versions", ", ".join(f"{name} {version}" for name, version in data["versions"].items())),
    ]
    return [(name, text) for name, text in given if text]


def side_facts(data: Mapping[str, Any]) -> Iterator[tuple[str, Facts]]:
    """`reference` and `candidate`, and what each of them is."""
    for name, side in data["sides"].items():
        yield (
            name,
            [
                ("path", side["path"]),
                ("model", f"{side['architecture']}, {side['num_layers']} layers, {side['parameters']:,} parameters"),
                ("format", side["format"]),
                ("grid", side["grid"]["name"]),
                ("SHA-256", side["sha256"] or "not computed (--hash)"),
            ],
        )


def _device(logits: Mapping[str, Any]) -> str:
    ran = logits.get("candidate_ran")
    return ", ".join(ran["devices"]) if ran else logits.get("device", "")


def _dtype(logits: Mapping[str, Any]) -> str:
    if not logits:
        return ""
    rounded = logits["reference_rounded"]
    text = f"{logits['dtype']}, tolerance {logits['tolerance']:g}" if not logits["noise"] else logits["dtype"]
    return f"{text}; reference rounded: {', '.join(rounded)}" if rounded else text


def _tokens(logits: Mapping[str, Any]) -> str:
    lengths = [len(row) for row in logits.get("rows", [])]
    if not lengths:
        return ""
    span = f"{min(lengths):,} to {max(lengths):,}" if min(lengths) < max(lengths) else f"{lengths[0]:,}"
    greedy = logits["greedy"]
    appended = len(greedy["continuation"][0]) if greedy and greedy["continuation"] else 0
    end = f", the last {appended} of each chosen by the reference" if appended else ""
    return f"{sum(lengths):,} in {len(lengths):,} rows of {span}{end}"


def _rollouts(details: Mapping[str, Any]) -> str:
    if not details:
        return ""
    return (
        f"{details['file']}: {details['sampled']:,} sampled tokens in {details['rows']:,} rows; engine in"
        f" {details['engine_dtype']}, temperature {details['temperature']:g}"
    )


def _learnt(details: Mapping[str, Any]) -> str:
    if not details:
        return ""
    return (
        f"{len(details['errors'])} of at most {details['steps_limit']:,} steps, {details['prompts']} prompts of"
        f" {details['prompt_tokens']} tokens, {details['group']} completions of each, seed {details['seed']}, AdamW at"
        f" {details['rate']:.1e}; {details['sampled']:,} tokens sampled"
    )


STEPS = ("step", "error, tokens", "length, tokens", "prompts with a signal")
"""Headings of `step_rows`."""


def step_rows(details: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """What the steps of the level trainability sampled."""
    columns = zip(details["errors"], details["lengths"], details["varied"], strict=True)
    return [
        (str(step), f"{error:.2f}", f"{length:.2f}", f"{100 * varied:.0f} %")
        for step, (error, length, varied) in enumerate(columns)
    ]


COLUMNS = {"reference": "reference", "candidate": "candidate", "replayed": "candidate with the engine's routing"}
"""Columns of the level rollouts, in words."""
FIGURES = {
    "mean": "mean difference",
    "p99": "99th percentile",
    "largest": "largest",
    "k1": "KL (k1)",
    "k2": "KL (k2)",
    "k3": "KL (k3)",
    "ratio_min": "smallest ratio",
    "ratio_max": "largest ratio",
    "outside": "share outside 0.8 to 1.2",
    "above": "share above 2",
    "sequence_min": "smallest ratio of a sequence",
    "sequence_mean": "mean ratio of sequences",
    "sequence_max": "largest ratio of a sequence",
    "effective": "effective sample size, tokens",
    "effective_sequences": "effective sample size, sequences",
    "perplexity": "perplexity",
}
"""Figures of a column, in words."""


def rollout_table(details: Mapping[str, Any]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Headings and rows of the figures of the level rollouts: a column for each run against the engine."""
    columns = details["columns"]
    rows = [
        (words, *("not finite" if part[name] is None else f"{part[name]:.4g}" for part in columns.values()))
        for name, words in FIGURES.items()
    ]
    return ("against the engine", *(COLUMNS[name] for name in columns)), rows


WORST = ("token", "row", "position", "engine", "candidate", "context")
"""Headings of `worst_rows`."""


def worst_rows(details: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The tokens of rollouts whose log-probabilities differ most."""
    return [
        (
            str(found["token"]),
            str(found["row"]),
            str(found["position"]),
            f"{found['engine']:.4f}",
            "not finite" if found["candidate"] is None else f"{found['candidate']:.4f}",
            found["text"] if found["text"] is not None else " ".join(map(str, found["context"])),
        )
        for found in details["worst"]
    ]


def difference_rows(data: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The tensors that differ, the largest difference first."""
    return [
        (
            found["tensor"],
            "" if found["layer"] is None else str(found["layer"]),
            "not finite" if found["largest"] is None else f"{found['largest']:.3g}",
            f"{found['differing']:,} of {found['elements']:,}",
            ranges(found["ranks"]),
        )
        for found in details_of(data, "weights").get("differences", [])
    ]


def guilty_ranks(data: Mapping[str, Any]) -> str:
    """The ranks of the candidate that hold what differs, in words; empty for one rank, which is no news."""
    side = data["sides"].get("candidate")
    if side is None or len(side["ranks"]) == 1:
        return ""
    ranks = sorted({rank for rank, _ in guilty_places(data)})
    return f"rank{'s' if len(ranks) > 1 else ''} {ranges(ranks)}" if ranks else ""


def fed_by(data: Mapping[str, Any]) -> tuple[str, list[str]] | None:
    """Where the models part, and the tensors that feed that place; None if that is not known."""
    location = details_of(data, "logits").get("location")
    return None if not location else (location["place"], location["tensors"])


def worst_place(details: Mapping[str, Any]) -> str | None:
    """The place of the worst gradient of a level that runs backwards, if any is wrong."""
    wrong = [*details.get("differing", []), *details.get("missing", []), *details.get("surplus", [])]
    return place_of(wrong[0])[1] if wrong else None


def ranges(numbers: Sequence[int]) -> str:
    """Numbers in order, runs of them as `first-last`; of many runs only the first ones."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and runs[-1][-1] == number - 1:
            runs[-1][1:] = [number]
        else:
            runs.append([number])
    texts = ["-".join(map(str, run)) for run in runs[:SOME_RANKS]]
    return ", ".join(texts) + (", ..." if len(runs) > SOME_RANKS else "")


def guilty_places(data: Mapping[str, Any]) -> set[tuple[int, int]]:
    """(rank of the candidate, row of its map) of what differs; row 0 is the embedding, the last one the head.

    Where bytes differ, the ranks that hold them; otherwise all ranks that hold the place where the models part, or, if
    the logits agree, those that hold the worst gradient.
    """
    side = data["sides"].get("candidate")
    if side is None:
        return set()
    differences = details_of(data, "weights").get("differences", [])
    rows = [(_row_of(item["tensor"], item["layer"], side), item["ranks"]) for item in differences]
    everywhere = [rank["rank"] for rank in side["ranks"]]
    if not rows and (parted := fed_by(data)) is not None:
        rows = [(_row_of_place(parted[0], side), everywhere)]
    if not rows:
        found = (worst_place(details_of(data, level)) for level in BACKWARD)
        rows = [(_row_of_place(place, side), everywhere) for place in found if place is not None][:1]
    holds = {(rank["rank"], row) for rank in side["ranks"] for chunk in rank["chunks"] for row in rows_of(chunk, side)}
    return {(rank, row) for row, ranks in rows for rank in ranks} & holds


def rows_of(chunk: Mapping[str, Any], side: Mapping[str, Any]) -> list[int]:
    """Rows of the map that a model chunk covers."""
    last = side["num_layers"] + 1
    return [0] * chunk["embedding"] + [layer + 1 for layer in chunk["layers"]] + [last] * chunk["head"]


def _row_of(tensor: str, layer: int | None, side: Mapping[str, Any]) -> int:
    if layer is not None:
        return layer + 1
    return 0 if tensor.startswith("embedding.") else int(side["num_layers"]) + 1


def _row_of_place(place: str, side: Mapping[str, Any]) -> int:
    words = place.split()
    if words[0] == "layer":
        return int(words[1]) + 1
    return 0 if place == "embedding" else int(side["num_layers"]) + 1
