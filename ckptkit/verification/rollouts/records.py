"""What inference engines and trainers record of a generation, as turns. Every shape is recognised by its keys.

Sources of the shapes: `ChatCompletionResponse`, `CompletionResponse` and `RequestOutput` of vLLM; the answer of
`/generate` of SGLang; `DataProto` of verl; `Sample.to_dict` of slime. `fixtures/rollouts/shapes.json` names files and
commits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ckptkit.errors import InputError
from ckptkit.verification.rollouts.routing import Recorded, read_recorded

if TYPE_CHECKING:
    from collections.abc import Iterable

LONGEST = 2**20
"""Tokens of a turn, at most."""
LARGEST_ID = 2**31
UNLIKELY = -9999.0
"""What servers write for a log-probability that JSON cannot hold: minus infinity."""
ROUNDED_UP = 1e-3
"""A log-probability that is above zero by so much is one that was rounded."""
TEXT_OF_VERL = frozenset({"input", "output", "gts", "score", "step"})
"""Keys of a line that verl dumps, which are text."""
STARTS = ("routed_experts_prompt_start", "routed_experts_start_len")
"""Where requests name the first token whose routing is recorded."""


@dataclass(frozen=True)
class Turn:
    """A prompt and what an engine sampled after it.

    Attributes:
        prompt: Token ids.
        tokens: Token ids.
        logprobs: Log-probability of each of `tokens`; None where there is none.
        line: Where it was read, from 1.
        prompt_logprobs: Those of `prompt`, of which the first has none; or empty.
        routing: Experts of the tokens, or None.
        shape: What recorded it.
    """

    prompt: list[int]
    tokens: list[int]
    logprobs: list[float | None]
    line: int
    prompt_logprobs: list[float | None] = field(default_factory=list)
    routing: Recorded | None = None
    shape: str = ""


class _Line:
    """Where a value stands, for errors."""

    def __init__(self, where: object, number: int) -> None:
        self.where, self.number = f"{where}, line {number}", number

    def error(self, what: str, hint: str | None = None) -> InputError:
        return InputError(what, where=self.where, hint=hint)


def turns_of(record: Mapping[str, Any], where: object, number: int) -> tuple[str, list[Turn]]:
    """The turns of a record: one, or several samples of one prompt or of one batch.

    Args:
        record: The JSON object of a line. What was asked may stand beside what was answered, as `request` and
            `response`.
        where: Name of the file.
        number: Number of the line, from 1.

    Returns:
        What recorded it, and the turns.

    Raises:
        InputError: It has no shape that is known here, no ids, or contradicts itself.
    """
    line = _Line(where, number)
    request = record.get("request") if isinstance(record.get("request"), dict) else {}
    answer = record.get("response") if isinstance(record.get("response"), dict) else record
    assert isinstance(request, dict) and isinstance(answer, dict)
    for name, keys, read in SHAPES:
        if keys <= answer.keys():
            found = list(read({**request, **answer}, line))
            return name, [Turn(**{**vars(turn), "shape": name}) for turn in found]
    if answer.keys() >= TEXT_OF_VERL:
        what = "this is what verl writes to rollout_data_dir: text without ids"
        raise line.error(what, hint="text is not tokenised again: write the rows of the batch, whose keys are ids")
    known = "; ".join(f"{name}: {', '.join(sorted(keys))}" for name, keys, _ in SHAPES)
    raise line.error(f"no known shape of a rollout (keys: {', '.join(sorted(answer)[:8])})", hint=f"known are {known}")


# The shapes -----------------------------------------------------------------------------------------------------------


def _server(record: Mapping[str, Any], line: _Line) -> Iterator[Turn]:
    """VLLM's OpenAI server: prompts stand beside the choices of a chat, and inside those of a completion."""
    choices = record["choices"]
    if not isinstance(choices, list) or not choices or not all(isinstance(choice, dict) for choice in choices):
        raise line.error("choices is no list of objects")
    for choice in choices:
        whole = {**{key: record[key] for key in ("prompt_token_ids", "prompt_logprobs", *STARTS) if key in record}}
        whole |= {key: value for key, value in choice.items() if value is not None}
        prompt = _ids(whole.get("prompt_token_ids"), "prompt_token_ids", line)
        tokens = _ids(whole.get("token_ids"), "token_ids", line)
        logprobs = _of_server(whole.get("logprobs"), len(prompt), len(tokens), line)
        yield _turn(whole, prompt, tokens, logprobs, line)


def _of_server(found: Any, prompt: int, tokens: int, line: _Line) -> list[Any]:
    """The list of log-probabilities in `logprobs` of a choice."""
    if not isinstance(found, dict):
        raise line.error("a choice has no logprobs", hint='ask the server for them ("logprobs": true, or 0)')
    if isinstance(content := found.get("content"), list):
        return [item.get("logprob") if isinstance(item, dict) else None for item in content]
    values = found.get("token_logprobs")
    if not isinstance(values, list):
        raise line.error("logprobs has neither content nor token_logprobs")
    # With `echo` those of the prompt stand before them.
    return values[prompt:] if len(values) == prompt + tokens and prompt else values


def _offline(record: Mapping[str, Any], line: _Line) -> Iterator[Turn]:
    """`RequestOutput` of vLLM's class LLM."""
    outputs = record["outputs"]
    if not isinstance(outputs, list) or not outputs or not all(isinstance(output, dict) for output in outputs):
        raise line.error("outputs is no list of objects")
    prompt = _ids(record["prompt_token_ids"], "prompt_token_ids", line)
    for output in outputs:
        tokens = _ids(output.get("token_ids"), "outputs[].token_ids", line)
        logprobs = output.get("logprobs")
        if not isinstance(logprobs, list) or len(logprobs) != len(tokens):
            raise line.error("outputs[].logprobs is not one entry per token", hint="SamplingParams(logprobs=0)")
        found = [_of_token(entry, token) for entry, token in zip(logprobs, tokens, strict=True)]
        yield _turn({**record, **output}, prompt, tokens, found, line)


def _of_token(entry: Any, token: int) -> Any:
    """A token's log-probability in a map from ids, or the number itself."""
    if isinstance(entry, dict):
        entry = entry.get(str(token))
        return entry.get("logprob") if isinstance(entry, dict) else entry
    return entry


def _sglang(record: Mapping[str, Any], line: _Line) -> Iterator[Turn]:
    """SGLang's `/generate`: pairs of log-probability and id."""
    meta = record["meta_info"]
    if not isinstance(meta, dict) or not isinstance(meta.get("output_token_logprobs"), list):
        raise line.error("meta_info has no output_token_logprobs", hint='ask with "return_logprob": true')
    values, tokens = _pairs(meta["output_token_logprobs"], "meta_info.output_token_logprobs", line)
    if record["output_ids"] is not None and _ids(record["output_ids"], "output_ids", line) != tokens:
        raise line.error("output_ids and meta_info.output_token_logprobs name different tokens")
    before: list[Any] = []
    given = record.get("input_ids", record.get("prompt_token_ids"))
    if given is None and isinstance(meta.get("input_token_logprobs"), list):
        before, prompt = _pairs(meta["input_token_logprobs"], "meta_info.input_token_logprobs", line)
        counted = meta.get("prompt_tokens")
        if counted is not None and counted != len(prompt):
            raise line.error(
                f"meta_info.input_token_logprobs has {len(prompt)} of {counted} prompt tokens",
                hint='ask with "logprob_start_len": 0, or keep the request\'s input_ids beside the answer',
            )
    else:
        prompt = _ids(given, "input_ids", line)
    whole = {**record, "routed_experts": meta.get("routed_experts"), "prompt_logprobs": before or None}
    whole |= {name: meta[name] for name in STARTS if meta.get(name) is not None}
    yield _turn(whole, prompt, tokens, values, line)


def _pairs(found: list[Any], name: str, line: _Line) -> tuple[list[Any], list[int]]:
    if not all(isinstance(pair, list) and len(pair) >= 2 for pair in found):
        raise line.error(f"{name} is no list of pairs of log-probability and id")
    return [pair[0] for pair in found], _ids([pair[1] for pair in found], name, line)


def _slime(record: Mapping[str, Any], line: _Line) -> Iterator[Turn]:
    """A sample of slime: all tokens, of which the last `response_length` are the response."""
    tokens = _ids(record["tokens"], "tokens", line)
    length = record["response_length"]
    if type(length) is not int or not 0 < length < len(tokens):
        raise line.error(f"response_length is {length!r} for {len(tokens)} tokens")
    mask = record.get("loss_mask")
    logprobs = _masked(record["rollout_log_probs"], [1] * length if mask is None else mask, length, line)
    at = len(tokens) - length
    experts = record.get("rollout_routed_experts")
    if isinstance(experts, list):  # from the first token on, as far as the engine got
        spare = min(max(0, len(tokens) - 1 - len(experts)), _unsampled_at_the_end(logprobs))
        tokens, logprobs = tokens[: len(tokens) - spare], logprobs[: len(logprobs) - spare]
    whole = {**record, "routed_experts": experts, STARTS[0]: None if experts is None else 0}
    yield _turn(whole, tokens[:at], tokens[at:], logprobs, line)


def _unsampled_at_the_end(logprobs: Sequence[Any]) -> int:
    """Tokens at the end of a response that no engine sampled, as what a tool answered: none has seen them."""
    return next((count for count, value in enumerate(reversed(logprobs)) if value is not None), len(logprobs))


def _verl(record: Mapping[str, Any], line: _Line) -> Iterator[Turn]:
    """One row or a batch of verl: prompts padded on the left, responses on the right."""
    columns = ("prompts", "responses", "rollout_log_probs", "response_mask", "attention_mask", "routed_experts")
    given = {name: record[name] for name in columns if record.get(name) is not None}
    if missing := {"prompts", "responses", "rollout_log_probs"} - given.keys():
        raise line.error(f"no {', '.join(sorted(missing))}")
    if not isinstance(given["responses"], list) or not given["responses"]:
        raise line.error("responses is no list")
    if not isinstance(given["responses"][0], list):
        given = {name: [value] for name, value in given.items()}
    rows = len(given["responses"])
    for name, column in given.items():
        if not isinstance(column, list) or len(column) != rows:
            raise line.error(f"{name} has not the {rows} rows of responses")
    for number in range(rows):
        yield _verl_row({name: column[number] for name, column in given.items()}, line)


def _verl_row(row: Mapping[str, Any], line: _Line) -> Turn:
    prompt, response = (_ids(row[name], name, line) for name in ("prompts", "responses"))
    total = len(prompt) + len(response)
    mask = row.get("response_mask", [1] * len(response))
    logprobs = _masked(row["rollout_log_probs"], mask, len(response), line)
    seen = row.get("attention_mask", [1] * total)
    if not isinstance(seen, list) or len(seen) != total or any(value not in (0, 1) for value in seen):
        raise line.error(f"attention_mask is no list of 0 and 1 for {total} tokens")
    before, after = seen[: len(prompt)], seen[len(prompt) :]
    tokens = [token for token, counts in zip(response, after, strict=True) if counts]
    values = [value for value, counts in zip(logprobs, after, strict=True) if counts]
    whole: dict[str, Any] = dict(row)
    if isinstance(experts := row.get("routed_experts"), list):  # of the padding, too, and of the last token
        kept = [entry for entry, counts in zip(experts, seen, strict=False) if counts][: sum(seen) - 1]
        spare = 0
        while spare < min(len(kept), _unsampled_at_the_end(values)) and _is_zero(kept[-1 - spare]):
            spare += 1  # zeros: the engine did not get there
        tokens, values = tokens[: len(tokens) - spare], values[: len(values) - spare]
        whole["routed_experts"] = kept[: len(kept) - spare]
    return _turn(whole, [t for t, counts in zip(prompt, before, strict=True) if counts], tokens, values, line)


def _is_zero(experts: Any) -> bool:
    """Whether a token was sent to expert 0 only, in every layer: nothing was recorded for it."""
    return isinstance(experts, list) and all(
        isinstance(layer, list) and all(expert == 0 for expert in layer) for layer in experts
    )


def _masked(values: Any, mask: Any, length: int, line: _Line) -> list[Any]:
    """Log-probabilities of a response, None where its mask says that the engine did not sample."""
    for name, found in (("rollout_log_probs", values), ("the mask of the response", mask)):
        if not isinstance(found, list) or len(found) != length:
            raise line.error(f"{name} has not one entry for each of the {length} tokens of the response")
    if any(counts not in (0, 1) for counts in mask):
        raise line.error("the mask of the response is no list of 0 and 1")
    return [value if counts else None for value, counts in zip(values, mask, strict=True)]


def _flat(record: Mapping[str, Any], line: _Line) -> Iterator[Turn]:
    """One object a line, the form for everything else."""
    prompt = _ids(record["prompt_token_ids"], "prompt_token_ids", line)
    tokens = _ids(record["token_ids"], "token_ids", line)
    if not isinstance(record["logprobs"], list):
        raise line.error("logprobs is no list")
    yield _turn(record, prompt, tokens, record["logprobs"], line)


Reader = Callable[[Mapping[str, Any], _Line], "Iterable[Turn]"]
SHAPES: tuple[tuple[str, frozenset[str], Reader], ...] = (
    ("vLLM's server", frozenset({"choices"}), _server),
    ("vLLM offline", frozenset({"prompt_token_ids", "outputs"}), _offline),
    ("SGLang", frozenset({"output_ids", "meta_info"}), _sglang),
    ("slime", frozenset({"tokens", "response_length", "rollout_log_probs"}), _slime),
    ("verl", frozenset({"responses", "rollout_log_probs"}), _verl),
    ("flat", frozenset({"prompt_token_ids", "token_ids", "logprobs"}), _flat),
)
"""Name of a shape, the keys that make it known, and its reader."""


# Parts ----------------------------------------------------------------------------------------------------------------


def _turn(
    record: Mapping[str, Any], prompt: list[int], tokens: list[int], logprobs: Sequence[Any], line: _Line
) -> Turn:
    if not prompt:
        raise line.error("the prompt is empty: nothing predicts the first token")
    found = _numbers(logprobs, len(tokens), "token", line)
    given = record.get("prompt_logprobs")
    before: list[float | None] = []
    if isinstance(given, list):
        if len(given) != len(prompt):
            raise line.error(f"{len(given)} prompt_logprobs for a prompt of {len(prompt)} tokens")
        values = [_of_token(entry, token) for entry, token in zip(given, prompt, strict=True)]
        before = [None, *_numbers(values[1:], len(prompt) - 1, "prompt token", line)]
    routing = None
    if record.get("routed_experts") is not None:
        stated = next((record[name] for name in STARTS if record.get(name) is not None), None)
        forwarded = len(prompt) + len(tokens) - 1
        routing = read_recorded(record["routed_experts"], forwarded, stated, line.where)
    return Turn(prompt, tokens, found, line.number, before, routing)


def _ids(found: Any, name: str, line: _Line) -> list[int]:
    """Token ids.

    Raises:
        InputError: There are none, or they are no ids.
    """
    if found is None:
        hint = 'text is not tokenised again: record the ids (vLLM: "return_token_ids": true)'
        raise line.error(f"no {name}", hint=hint)
    if not isinstance(found, list) or not all(type(token) is int and 0 <= token < LARGEST_ID for token in found):
        raise line.error(f"{name} is no list of token ids", hint="text is not tokenised again: record the ids")
    if len(found) > LONGEST:
        raise line.error(f"{name} has {len(found):,} tokens, more than {LONGEST:,}")
    return list(found)


def _numbers(found: Sequence[Any], length: int, what: str, line: _Line) -> list[float | None]:
    """Log-probabilities, one per token."""
    if len(found) != length:
        raise line.error(f"{len(found)} log-probabilities for {length} {what}s")
    values: list[float | None] = []
    for at, value in enumerate(found):
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if value is not None and not (number and math.isfinite(value) and value <= ROUNDED_UP):
            raise line.error(f"{what} {at} has the log-probability {value!r}")
        values.append(None if value is None or value <= UNLIKELY else float(value))
    return values
