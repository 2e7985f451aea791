"""The shapes of rollouts: each is recognised by its keys, and what is damaged is refused."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ckptkit.errors import InputError, StorageError
from ckptkit.verification.rollouts.reading import LONGEST_LINE, read_rollouts
from ckptkit.verification.rollouts.records import Turn, turns_of

PROMPT, TOKENS, LOGPROBS = [7, 8, 9], [4, 5], [-0.5, -1.5]
EXPERTS = np.array([[[0, 1]], [[1, 2]], [[3, 0]], [[2, 1]]], np.int32)
"""[4 of 5 tokens, 1 layer, 2 experts]."""


def npy(array: np.ndarray) -> str:
    stream = io.BytesIO()
    np.save(stream, array)
    return base64.b64encode(stream.getvalue()).decode()


def raw(array: np.ndarray) -> str:
    return base64.b64encode(array.astype("<i4").tobytes()).decode()


def entry(value: float, token: int) -> dict[str, Any]:
    return {str(token): {"logprob": value, "rank": 1, "decoded_token": "x"}}


SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "flat": ("flat", {"prompt_token_ids": PROMPT, "token_ids": TOKENS, "logprobs": LOGPROBS}),
    "chat": (
        "vLLM's server",
        {
            "object": "chat.completion",
            "prompt_token_ids": PROMPT,
            "prompt_logprobs": None,
            "choices": [
                {
                    "index": 0,
                    "message": {"role": "assistant", "content": "x"},
                    "token_ids": TOKENS,
                    "logprobs": {"content": [{"token": "x", "logprob": value} for value in LOGPROBS]},
                    "routed_experts": npy(EXPERTS.astype(np.uint8)),
                }
            ],
        },
    ),
    "completion": (
        "vLLM's server",
        {
            "object": "text_completion",
            "choices": [
                {
                    "prompt_token_ids": PROMPT,
                    "prompt_logprobs": [None, entry(-2.0, 8), entry(-3.0, 9)],
                    "token_ids": TOKENS,
                    "logprobs": {"token_logprobs": LOGPROBS, "tokens": ["x", "y"]},
                    "routed_experts": None,
                }
            ],
        },
    ),
    "with the request": (
        "vLLM's server",
        {
            "request": {"prompt": PROMPT, "routed_experts_prompt_start": 2, "logprobs": 0},
            "response": {
                "choices": [
                    {
                        "prompt_token_ids": PROMPT,
                        "token_ids": TOKENS,
                        "logprobs": {"token_logprobs": [None, -2.0, -3.0, *LOGPROBS]},
                        "routed_experts": npy(EXPERTS[2:]),
                    }
                ]
            },
        },
    ),
    "offline": (
        "vLLM offline",
        {
            "request_id": "0",
            "prompt_token_ids": PROMPT,
            "outputs": [
                {
                    "token_ids": TOKENS,
                    "logprobs": [{**entry(-9.0, 3), **entry(v, t)} for v, t in zip(LOGPROBS, TOKENS, strict=True)],
                    "routed_experts": EXPERTS.tolist(),
                }
            ],
        },
    ),
    "sglang": (
        "SGLang",
        {
            "text": "x",
            "output_ids": TOKENS,
            "meta_info": {
                "prompt_tokens": 3,
                "input_token_logprobs": [[None, 7, None], [-2.0, 8, None], [-3.0, 9, None]],
                "output_token_logprobs": [[v, t, None] for v, t in zip(LOGPROBS, TOKENS, strict=True)],
                "routed_experts": raw(EXPERTS),
            },
        },
    ),
    "slime": (
        "slime",
        {
            "tokens": [*PROMPT, *TOKENS],
            "response_length": 2,
            "rollout_log_probs": LOGPROBS,
            "loss_mask": [1, 1],
            "rollout_routed_experts": EXPERTS.tolist(),
        },
    ),
    "verl": (
        "verl",
        {
            "prompts": [0, *PROMPT],
            "responses": [*TOKENS, 0],
            "rollout_log_probs": [*LOGPROBS, 0.0],
            "response_mask": [1, 1, 0],
            "attention_mask": [0, 1, 1, 1, 1, 1, 0],
            "routed_experts": [[[0, 0]], *EXPERTS.tolist(), [[0, 0]], [[0, 0]]],
        },
    ),
}


@pytest.mark.parametrize("kind", SHAPES)
def test_every_shape_says_the_same(kind: str) -> None:
    name, record = SHAPES[kind]
    found, (turn,) = turns_of(record, "f", 3)
    assert found == turn.shape == name
    assert (turn.prompt, turn.tokens, turn.logprobs, turn.line) == (PROMPT, TOKENS, LOGPROBS, 3)
    if kind in ("completion", "sglang"):
        assert turn.prompt_logprobs == [None, -2.0, -3.0]
    if turn.routing is not None:
        shaped = turn.routing.shaped((1,), 3, 2, 4)
        start = 2 if kind == "with the request" else 0
        assert shaped.start == start and np.array_equal(shaped.experts, EXPERTS[start:])
    assert (turn.routing is None) == (kind in ("flat", "completion"))


def test_batches_and_masks_of_verl() -> None:
    _, record = SHAPES["verl"]
    batch = {name: [value, value] for name, value in record.items()} | {"response_mask": [[0, 1, 0], [1, 1, 0]]}
    _, turns = turns_of(batch, "f", 1)
    assert [turn.logprobs for turn in turns] == [[None, LOGPROBS[1]], LOGPROBS]


def changed(kind: str, path: str, value: Any) -> dict[str, Any]:
    record: dict[str, Any] = json.loads(json.dumps(SHAPES[kind][1]))
    at: Any = record
    *steps, last = path.split(".")
    for step in steps:
        at = at[int(step) if isinstance(at, list) else step]
    at[last] = value
    return record


@pytest.mark.parametrize(
    ("kind", "path", "value", "what"),
    [
        ("flat", "token_ids", "hello", "no list of token ids"),
        ("flat", "prompt_token_ids", [1, -1], "no list of token ids"),
        ("flat", "prompt_token_ids", [True], "no list of token ids"),
        ("flat", "prompt_token_ids", [], "the prompt is empty"),
        ("flat", "logprobs", [-0.5], "1 log-probabilities for 2 tokens"),
        ("flat", "logprobs", [-0.5, 0.7], "log-probability 0.7"),
        ("flat", "logprobs", [-0.5, "x"], "log-probability 'x'"),
        ("flat", "routed_experts_prompt_start", 9, None),
        ("chat", "prompt_token_ids", None, "no prompt_token_ids"),
        ("chat", "choices.0.token_ids", None, "no token_ids"),
        ("chat", "choices.0.logprobs", None, "no logprobs"),
        ("chat", "choices", [], "choices is no list"),
        ("chat", "choices.0.routed_experts", "?", "no base64"),
        ("offline", "outputs.0.logprobs", [{}], "one entry per token"),
        ("sglang", "output_ids", [4, 6], "different tokens"),
        ("sglang", "meta_info.prompt_tokens", 4, "3 of 4 prompt tokens"),
        ("sglang", "meta_info.output_token_logprobs", None, "no output_token_logprobs"),
        ("slime", "response_length", 5, "response_length is 5"),
        ("slime", "loss_mask", [1], "one entry for each of the 2 tokens"),
        ("slime", "loss_mask", [1, "no"], "no list of 0 and 1"),
        ("verl", "prompts", None, "no prompts"),
        ("verl", "rollout_log_probs", None, "no rollout_log_probs"),
        ("verl", "attention_mask", [1], "attention_mask"),
    ],
)
def test_what_is_refused(kind: str, path: str, value: Any, what: str | None) -> None:
    record = changed(kind, path, value)
    if what is None:
        turns_of(record, "f", 2)
        return
    with pytest.raises(InputError, match=what) as raised:
        turns_of(record, "f", 2)
    assert raised.value.where == "f, line 2"


def test_text_is_never_tokenised() -> None:
    with pytest.raises(InputError, match="no known shape"):
        turns_of({"prompt": "Hello", "text": "world", "logprobs": [-1.0]}, "f", 1)


def header(text: str, data: bytes = b"") -> str:
    whole = text.encode().ljust(117) + b"\n"
    return base64.b64encode(b"\x93NUMPY\x01\x00" + len(whole).to_bytes(2, "little") + whole + data).decode()


@pytest.mark.parametrize(
    ("value", "what"),
    [
        (header("{'descr': '<i4', 'fortran_order': False, 'shape': (1000000000000, 1, 2)}"), "with 0 bytes"),
        (header("{'descr': '|O', 'fortran_order': False, 'shape': (1, 1, 1)}", b"\x80\x04."), "object"),
        (header("__import__('os').abort()"), "no .npy file"),
        *(
            (header(f"{{'descr': '<i4', 'fortran_order': False, 'shape': {shape}}}", bytes(size)), "is an .npy file of")
            for shape, size in (("(-1, -1, 4)", 16), ("(True, 1, 1)", 4), (f"(0, {2**62}, {2**62})", 0), ("(1, 4)", 16))
        ),
        (base64.b64encode(b"abc").decode(), "not int32"),
        ([[[0, 1]], [[1]]], "no list of equal lists"),
        ([[[0.5, 1.0]]], "float64"),
        ([[0, 1]], "2 axes"),
    ],
)
def test_damaged_routing(value: Any, what: str) -> None:
    with pytest.raises(InputError, match=what):
        turns_of({**SHAPES["flat"][1], "routed_experts": value}, "f", 1)


@pytest.mark.parametrize(
    ("experts", "what"),
    [
        (np.zeros((4, 1, 2)), "zero everywhere"),
        (np.where(np.arange(4)[:, None, None] == 2, 0, EXPERTS), "token 2 twice"),
        (EXPERTS + 1, "expert 4 of 4"),
        (EXPERTS[:, :, :1], "2 experts per token"),
        (np.concatenate((EXPERTS, EXPERTS)), "8 tokens"),
    ],
)
def test_routing_of_another_model_or_none(experts: np.ndarray, what: str) -> None:
    _, (turn,) = turns_of({**SHAPES["flat"][1], "routed_experts": npy(experts.astype(np.int32))}, "f", 1)
    assert turn.routing is not None
    with pytest.raises(InputError, match=what):
        turn.routing.shaped((1,), 3, 2, 4)


def test_some_engines_record_all_layers() -> None:
    whole = np.zeros((4, 3, 2), np.int32)
    whole[:, 1:2] = EXPERTS
    _, (turn,) = turns_of({**SHAPES["flat"][1], "routed_experts": raw(whole)}, "f", 1)
    assert turn.routing is not None
    assert np.array_equal(turn.routing.shaped((1,), 3, 2, 4).experts, EXPERTS)


def flat(prompt: list[int], tokens: list[int], **more: Any) -> dict[str, Any]:
    return {"prompt_token_ids": prompt, "token_ids": tokens, "logprobs": [-1.0] * len(tokens), **more}


def test_turns_become_rows(tmp_path: Path) -> None:
    records = [
        flat([1, 2], [3], routed_experts=[[[0, 1]], [[1, 0]]]),
        flat([1, 2], [4]),  # another sample of the same prompt
        flat([1, 2, 3, 9], [5, 6], routed_experts_prompt_start=3, routed_experts=[[[1, 2]], [[2, 1]]]),
        flat([1, 2, 8, 9], [5]),  # rendered again: it continues the prompt, not the answer
        flat([1, 2, 3, 9, 5, 6, 0], [7]),
    ]
    path = tmp_path / "r.jsonl"
    path.write_text("\n\n".join(map(json.dumps, records)))
    found = read_rollouts(path)
    joined = found.joined
    assert (joined.turns, joined.joined, joined.apart, len(joined.rows)) == (5, 2, 1, 3)
    first = joined.rows[0]
    assert first.tokens == [1, 2, 3, 9, 5, 6, 0, 7]
    assert [value is not None for value in first.logprobs] == [False, False, True, False, True, True, False, True]
    assert (first.prompt, first.lines) == (2, [1, 5, 9])
    assert [part.shaped((0,), 1, 2, 3).start for part in first.routings] == [0, 3]
    assert found.shapes == {"flat": 5} and found.unrecorded == 0


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("", "no log-probability"),
        ("{", "not valid JSON"),
        ("[1]", "not a JSON object"),
        ('{"a": NaN}', "NaN"),
        ("[" * 100_000, "nested"),
        (json.dumps(flat([1], [2], logprobs=[-9999.0])), "no log-probability"),
    ],
)
def test_damaged_files(tmp_path: Path, text: str, what: str) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text(text)
    with pytest.raises(InputError, match=what):
        read_rollouts(path)


def test_no_file_is_read_without_end(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        read_rollouts(tmp_path / "none")
    with pytest.raises(StorageError, match="File name too long"):
        read_rollouts(tmp_path / ("n" * 300))
    with pytest.raises(InputError, match="not a regular file"):
        read_rollouts("/dev/zero")
    path = tmp_path / "long"
    with path.open("wb") as file:
        file.truncate(LONGEST_LINE + 2)
    with pytest.raises(InputError, match="longer than"):
        read_rollouts(path)


def test_a_turn_keeps_what_was_not_recorded() -> None:
    _, (turn,) = turns_of(flat([1], [2, 3], logprobs=[None, -9999.0]), "f", 1)
    assert isinstance(turn, Turn) and turn.logprobs == [None, None]
