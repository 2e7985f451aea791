"""Fitted adapters: the streams they are fitted to, the fits themselves, and the commands."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from ckptkit import convert
from ckptkit.checkpoints.opening import open_checkpoint
from ckptkit.cli import app as cli
from ckptkit.errors import CkptkitError, InputError, StorageError, UnsupportedError, UsageError
from ckptkit.io.room import Room
from ckptkit.sharding.grid import Parallelism
from ckptkit.steps import Step
from ckptkit.surgery import fitting
from ckptkit.surgery.activations import residual_stream
from ckptkit.surgery.build import build
from ckptkit.surgery.calibration import Calibration, read_sequences, split
from ckptkit.surgery.refit import refit
from tests.precision import relative_error
from tests.surgery.pairs import (
    FIRST,
    LAST,
    NARROW,
    NUM_FIRST,
    NUM_LAST,
    WIDE,
    build_split,
    load_remote,
    recipe,
    save_half,
)

Pair = tuple[Path, Path]
ROWS = [
    [(11 * i + 3 * i * i + 17 * n) % 250 for i in range(length)] for n, length in enumerate((40, 40, 25, 40, 33, 2))
]


@pytest.fixture
def calibration(tmp_path: Path) -> Path:
    """Enough tokens for a map of 64 inputs."""
    draw = np.random.default_rng(0)
    path = tmp_path / "ids.json"
    path.write_text(json.dumps(draw.integers(0, 250, (12, 40)).tolist()))
    return path


# The streams


@pytest.mark.parametrize("number", [0, 1, 2])
def test_streams_are_the_hidden_states_of_transformers(wide_pair: Pair, number: int) -> None:
    from transformers import LlamaForCausalLM

    for path in wide_pair:
        model = LlamaForCausalLM.from_pretrained(path).eval()
        found = residual_stream(open_checkpoint(path), number, ROWS)
        for row, stream in zip(ROWS, found, strict=True):
            with torch.no_grad():
                expected = model(torch.tensor([row]), output_hidden_states=True).hidden_states[number][0]
            assert stream.dtype == torch.float32
            assert torch.allclose(stream, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def test_streams_of_any_format_and_of_the_first_half_of_a_split_llama(wide_pair: Pair, tmp_path: Path) -> None:
    convert(wide_pair[0], tmp_path / "meg", to="torch", grid=Parallelism(2))
    built = build_split(tmp_path / "split", wide_pair, "mlp")
    expected = residual_stream(open_checkpoint(wide_pair[0]), NUM_FIRST, ROWS)
    for path in (tmp_path / "meg", built):
        found = residual_stream(open_checkpoint(path), NUM_FIRST, ROWS)
        errors = [relative_error(stream, other) for stream, other in zip(found, expected, strict=True)]
        assert max(errors) < 1e-5


def test_one_layer_is_in_memory_at_a_time(wide_pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    import weakref

    from ckptkit.surgery import activations

    original, alive, most = activations._layer, weakref.WeakSet(), []  # type: ignore[var-annotated]

    def watched(*arguments: Any) -> Any:
        layer = original(*arguments)
        alive.add(layer)
        most.append(len(alive))
        return layer

    monkeypatch.setattr(activations, "_layer", watched)
    residual_stream(open_checkpoint(wide_pair[1]), 5, ROWS)
    assert len(most) == 5 and max(most) <= 2  # the next one is made before the name of the last one is given up


# The fits


def pairs(tokens: int = 300, noise: float = 0.1) -> tuple[list[torch.Tensor], list[torch.Tensor], np.ndarray]:
    """Four sequences whose targets are a map of their inputs, with noise, and first positions that are huge."""
    draw = np.random.default_rng(1)
    weight = draw.normal(size=(20, 8))
    x = draw.normal(size=(4, tokens // 4, 8)) * np.linspace(0.2, 3, 8)
    y = x @ weight.T + noise * draw.normal(size=(4, tokens // 4, 20))
    x[:, 0], y[:, 0] = 1e4, -3e5
    return [torch.from_numpy(s).float() for s in x], [torch.from_numpy(s).float() for s in y], weight


def inner(parts: list[torch.Tensor]) -> np.ndarray:
    """What is fitted: all but first positions."""
    return torch.cat([part[1:] for part in parts]).double().numpy()


def test_least_squares_are_those_of_numpy() -> None:
    xs, ys, weight = pairs()
    found = fitting.fit(fitting.solve_lstsq, xs, ys, held=0)
    expected = np.linalg.lstsq(inner(xs), inner(ys), rcond=None)[0].T
    assert np.allclose(found.weight, expected, rtol=1e-9, atol=1e-9)
    assert np.abs(found.weight - weight).max() < 0.2
    errors = inner(ys) - inner(xs) @ expected.T
    assert found.fitted.residual == pytest.approx(np.linalg.norm(errors) / np.linalg.norm(inner(ys)))
    variance = ((inner(ys) - inner(ys).mean(0)) ** 2).sum()
    assert found.fitted.r2 == pytest.approx(1 - (errors**2).sum() / variance)
    # First positions would have decided: they are told apart, and do not vary.
    assert found.first.tokens == 4 and found.first.r2 is None and found.first.residual > 0.5
    everything = np.linalg.lstsq(torch.cat(xs).numpy(), torch.cat(ys).numpy(), rcond=None)[0].T
    assert np.abs(everything - weight).max() > 10


def test_too_few_tokens_give_the_smallest_map() -> None:
    xs, ys, _ = pairs(tokens=8)
    found = fitting.fit(fitting.solve_lstsq, xs, ys, held=0)
    expected = np.linalg.lstsq(inner(xs), inner(ys), rcond=None)[0].T
    assert np.allclose(found.weight, expected, rtol=1e-6, atol=1e-8)
    assert any("only 4 tokens for 8 inputs" in note for note in found.notes("lstsq", 8))


def test_ridge() -> None:
    xs, ys, _ = pairs()
    sums = fitting.moments([(torch.from_numpy(inner(xs)), torch.from_numpy(inner(ys)))])
    penalty = 0.3 * np.mean(inner(xs) ** 2) * len(inner(xs))
    rows = np.concatenate((inner(xs), penalty**0.5 * np.eye(8)))
    expected = np.linalg.lstsq(rows, np.concatenate((inner(ys), np.zeros((8, 20)))), rcond=None)[0].T
    assert np.allclose(fitting.solve_ridge(sums, 0.3), expected)
    assert np.allclose(fitting.solve_ridge(sums, 1e-12), fitting.solve_lstsq(sums))


def test_procrustes_finds_a_rotation() -> None:
    draw = np.random.default_rng(2)
    rotation = np.linalg.qr(draw.normal(size=(20, 8)))[0]
    x = torch.from_numpy(draw.normal(size=(200, 8)))
    y = x @ torch.from_numpy(2.5 * rotation).T
    assert np.allclose(fitting.solve_procrustes(fitting.moments([(x, y)])), 2.5 * rotation)
    noisy = fitting.solve_procrustes(fitting.moments([(x, y + torch.from_numpy(draw.normal(size=(200, 20))))]))
    scale = np.linalg.norm(noisy[:, 0])
    assert np.allclose(noisy.T @ noisy, scale**2 * np.eye(8)) and not np.allclose(noisy, 2.5 * rotation)


def test_sums_do_not_depend_on_how_they_are_cut() -> None:
    xs, ys, _ = pairs()
    whole, parts = fitting.moments([(torch.cat(xs), torch.cat(ys))]), fitting.moments(zip(xs, ys, strict=True))
    assert np.allclose(whole.gram, parts.gram) and np.allclose(whole.cross, parts.cross)
    assert whole.gram.dtype == np.float64 and whole.tokens == parts.tokens == 300


def test_what_is_not_finite_is_refused() -> None:
    xs, ys, _ = pairs()
    ys[2][5, 3] = float("inf")
    with pytest.raises(InputError, match="not all finite"):
        fitting.fit(fitting.solve_lstsq, xs, ys, held=0)


# Calibration


def save_tokenizer(path: Path) -> None:
    """A tokenizer of letters, beside a model."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {chr(code): code for code in range(32, 127)}
    tokenizer = Tokenizer(models.WordLevel({**vocabulary, "?": 1}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.save(str(path / "tokenizer.json"))


def test_text_is_read_with_the_tokenizer_and_begins_with_bos(tmp_path: Path) -> None:
    model = save_half(tmp_path / "model", FIRST, 1, bos_token_id=7)
    save_tokenizer(model)
    text = tmp_path / "text.txt"
    text.write_text("hello world, this is it")
    found = read_sequences(Calibration(text, 14, 6), open_checkpoint(model))
    assert found == [[7, *map(ord, "hello")], [7, *map(ord, " worl")], [7, ord("d")]]


def test_what_is_held_out_is_never_all() -> None:
    rows = [[number, 0] for number in range(25)]
    used, held = split(rows)
    assert [row[0] for row in held] == [9, 19] and sorted(used + held) == rows
    assert split(rows[:1]) == (rows[:1], []) and split(rows[:3]) == (rows[:2], rows[2:3])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("ids.json", b"[[1, 2", "not JSON"),
        ("ids.json", b'{"a": 1}', "not a JSON list of lists"),
        ("ids.json", b"[[1, 2], [3, 250]]", "token id 250 in row 1 is not in the vocabulary of 250"),
        ("ids.json", b"[[1, true]]", "token id True in row 0"),
        ("ids.json", b"[[1], []]", "no sequence of 2 tokens"),
        ("text.txt", b"\xff\xfe\x00", "not a text in UTF-8"),
    ],
)
def test_bad_calibration(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    model = save_half(tmp_path / "model", FIRST, 1)
    save_tokenizer(model)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_sequences(Calibration(tmp_path / name), open_checkpoint(model))


def test_calibration_that_cannot_be_read(pair: Pair, tmp_path: Path) -> None:
    model = open_checkpoint(pair[0])
    with pytest.raises(InputError, match="cannot read the calibration"):
        read_sequences(Calibration(tmp_path / "nothing.json"), model)
    (tmp_path / "text.txt").write_text("text")
    with pytest.raises(UsageError, match=r"has no tokenizer\.json"):
        read_sequences(Calibration(tmp_path / "text.txt"), model)
    for options, message in (({}, "is fitted to text"), ({"length": 1}, "2 tokens"), ({"device": "tpu"}, "'tpu'")):
        given = {"calibration": "x.json"} if options else {}
        with pytest.raises(UsageError, match=message):
            Calibration.of({**given, **options}, "lstsq")


# Commands


ADAPTER = "model.adapter.weight"


def adapter_of(path: Path) -> torch.Tensor:
    return load_file(path / "model.safetensors")[ADAPTER]


@pytest.mark.parametrize("init", ["lstsq", "ridge:0.1", "procrustes"])
def test_build_with_a_fitted_adapter(wide_pair: Pair, tmp_path: Path, calibration: Path, init: str) -> None:
    result = build(recipe(wide_pair, init=init, options={"calibration": calibration}), tmp_path / "out")
    rows = json.loads(calibration.read_text())
    xs = residual_stream(open_checkpoint(wide_pair[0]), NUM_FIRST, rows)
    ys = residual_stream(open_checkpoint(wide_pair[1]), LAST["num_hidden_layers"] - NUM_LAST, rows)
    used = [number for number in range(12) if number != 9]
    weight = adapter_of(tmp_path / "out")
    assert weight.shape == (WIDE, NARROW)
    if init == "lstsq":
        x, y = inner([xs[number] for number in used]), inner([ys[number] for number in used])
        expected = np.linalg.lstsq(x, y, rcond=None)[0].T
        assert np.allclose(weight.numpy(), expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())
    told = json.loads((tmp_path / "out" / "config.json").read_text())["split_recipe"]["adapter_init"]
    assert told["name"] == init.partition(":")[0]
    assert told["fitted"]["tokens"] == 11 * 39 and told["held_out"]["tokens"] == 39
    assert told["first_position"]["tokens"] == 12
    assert any(
        re.search(r"429 tokens fitted on: residual 0\.\d+, R\^2 0?", note) for note in result.lossy + result.notes
    )


@pytest.mark.parametrize("kind", ["two-linear", "mlp"])
def test_two_matrices_start_as_the_fitted_map(wide_pair: Pair, tmp_path: Path, calibration: Path, kind: str) -> None:
    tokens, found = torch.tensor([[5, 6, 7, 8, 9]]), {}
    for name in ("linear", kind):
        build_split(tmp_path / name, wide_pair, name, init="lstsq", options={"calibration": calibration})
        with torch.no_grad():
            found[name] = load_remote(tmp_path / name)(tokens).logits
    assert relative_error(found[kind], found["linear"]) < 1e-4


def test_refit_gives_what_a_build_gives(wide_pair: Pair, tmp_path: Path, calibration: Path) -> None:
    given = {"calibration": calibration}
    direct = build_split(tmp_path / "direct", wide_pair, init="lstsq", options=given)
    built = build_split(tmp_path / "split", wide_pair)
    convert(built, tmp_path / "meg", to="torch", grid=Parallelism(2))
    expected = load_file(direct / "model.safetensors")
    for number, (source, first) in enumerate([(built, None), (built, wide_pair[0]), (tmp_path / "meg", None)]):
        out = tmp_path / f"out{number}"
        told: list[Step] = []
        done = refit(source, out, last=wide_pair[1], first=first, options=given, tell=told.append)
        assert 0 < done.seconds_fitting < done.seconds
        counts = {"narrow": NUM_FIRST, "wide": LAST["num_hidden_layers"] - NUM_LAST}
        for model, count in counts.items():
            layers = [step for step in told if f"the {model} model" in step.what]
            assert [(step.done, step.total) for step in layers] == [(done, count) for done in range(count + 1)]
        assert told[-1] == Step("fitting the adapter")
        weights = load_file(out / "model.safetensors")
        # The rest is copied; the adapter is computed once more.
        assert relative_error(weights.pop(ADAPTER), expected[ADAPTER]) < 1e-3
        assert weights.keys() | {ADAPTER} == expected.keys()
        assert all(torch.equal(value, expected[name]) for name, value in weights.items())
        assert load_remote(out).config.split_recipe["adapter_init"]["name"] == "lstsq"
    assert relative_error(adapter_of(built), adapter_of(direct)) > 0.1


def test_the_command(wide_pair: Pair, tmp_path: Path, calibration: Path) -> None:
    built, out = build_split(tmp_path / "split", wide_pair), tmp_path / "out"
    arguments = ["split-llama", "fit", str(built), "-o", str(out), "--last", str(wide_pair[1])]
    given = ["--calibration", str(calibration), "--adapter-init", "ridge"]
    dry = CliRunner().invoke(cli.app, [*arguments, *given, "--dry-run"])
    assert dry.exit_code == 0 and not out.exists() and "not in a dry run" in dry.output
    done = CliRunner().invoke(cli.app, [*arguments, *given, "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["source"]["recipe"]["adapter_init"]["strength"] == 0.01
    missing = CliRunner().invoke(cli.app, [*arguments, "--overwrite"])
    assert missing.exit_code == UsageError.exit_code


def test_models_that_a_split_llama_was_not_made_of(wide_pair: Pair, tmp_path: Path, calibration: Path) -> None:
    built = build_split(tmp_path / "split", wide_pair)
    given: dict[str, Any] = {"options": {"calibration": calibration}}
    with pytest.raises(UnsupportedError, match=r"--last is not what .* hidden_size 128 and 64"):
        refit(built, tmp_path / "out", last=wide_pair[0], **given)
    with pytest.raises(UnsupportedError, match=r"--first is not what .* hidden_size 64 and 128"):
        refit(built, tmp_path / "out", last=wide_pair[1], first=wide_pair[1], **given)
    shorter = save_half(tmp_path / "shorter", {**LAST, "num_hidden_layers": 2}, 2, dtype="float32")
    with pytest.raises(UnsupportedError, match="3 layers of 2"):
        refit(built, tmp_path / "out", last=shorter, **given)
    with pytest.raises(UnsupportedError, match="is no CustomSplitLLamaForCausalLM"):
        refit(wide_pair[0], tmp_path / "out", last=wide_pair[1], **given)
    with pytest.raises(UnsupportedError, match="is no LlamaForCausalLM"):
        refit(built, tmp_path / "out", last=built, **given)
    with pytest.raises(UsageError, match="kaiming is not fitted"):
        refit(built, tmp_path / "out", last=wide_pair[1], init="kaiming", **given)
    with pytest.raises(UsageError, match="ridge:-1"):
        refit(built, tmp_path / "out", last=wide_pair[1], init="ridge:-1", **given)
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu(wide_pair: Pair) -> None:
    with pytest.raises(UsageError, match="no CUDA device"):
        residual_stream(open_checkpoint(wide_pair[0]), 1, ROWS, device="cuda")


def test_a_wide_model_less_than_twice_as_wide_is_refused_before_anything_runs(
    wide_pair: Pair, tmp_path: Path, calibration: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    narrow = save_half(tmp_path / "narrow", {**LAST, "hidden_size": 96}, 2, dtype="float32")
    monkeypatch.setattr("ckptkit.surgery.activations.residual_stream", lambda *_, **__: pytest.fail("it ran"))
    with pytest.raises(UsageError, match="at least twice as wide"):
        build_split(tmp_path / "out", (wide_pair[0], narrow), "mlp", init="lstsq", options={"calibration": calibration})


@pytest.mark.slow
def test_fitted_adapters_begin_with_a_lower_held_out_loss() -> None:
    """On a pair that was trained a little, and files that neither models nor fits have seen."""
    from benchmarks.split_llama_init import Budget, corpus, measure

    budget = Budget(steps=60, adapter_steps=3, batch=8, held_out=32, tokens=8192)
    cases = [("linear", init) for init in ("kaiming", "procrustes", "ridge", "lstsq")] + [("mlp", "lstsq")]
    found = measure(0, *corpus(), budget, cases)
    start = {name: losses[0] for name, losses in found.items()}
    for fitted in ("linear procrustes", "linear ridge", "linear lstsq"):
        assert start[fitted] < start["linear kaiming"] - 0.5
    assert start["mlp lstsq"] == pytest.approx(start["linear lstsq"], abs=1e-4)
    assert found["linear lstsq"][1] < found["linear kaiming"][1]


@pytest.mark.parametrize("what", ["exists", "no parent", "no room"])
def test_a_destination_that_cannot_be_written_is_refused_before_anything_runs(
    wide_pair: Pair, tmp_path: Path, calibration: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    built, out = build_split(tmp_path / "split", wide_pair), tmp_path / "out"
    monkeypatch.setattr("ckptkit.surgery.activations.residual_stream", lambda *_, **__: pytest.fail("it ran"))
    if what == "exists":
        (out / "something").mkdir(parents=True)
    elif what == "no parent":
        out = tmp_path / "nowhere" / "out"
    else:
        monkeypatch.setattr("ckptkit.io.room.Room.of", lambda *_: Room(10, 1000, 1, True, False))
    kind: type[CkptkitError] = UsageError if what == "exists" else StorageError
    options = {"calibration": calibration}
    with pytest.raises(kind, match=r"exists|parent directory|not enough space"):
        build_split(out, wide_pair, init="lstsq", options=options)
    with pytest.raises(kind, match=r"exists|parent directory|not enough space"):
        refit(built, out, last=wide_pair[1], options=options)


def test_a_calibration_that_nothing_is_fitted_to_is_an_error(
    wide_pair: Pair, tmp_path: Path, calibration: Path
) -> None:
    for options in ({"calibration": calibration}, {"tokens": 50}, {"length": 16}):
        with pytest.raises(UsageError, match="kaiming is not fitted to a calibration; --adapter-init lstsq"):
            build_split(tmp_path / "out", wide_pair, init="kaiming", options=options)
    for init in ("kaiming:3", "lstsq:3"):
        with pytest.raises(UsageError, match=f"{init}: .* takes no argument; ridge and file do"):
            build_split(tmp_path / "out", wide_pair, init=init, options={})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_file_with_an_adapter_that_is_not_finite_is_refused(wide_pair: Pair, tmp_path: Path, value: float) -> None:
    matrix = torch.randn(128, 64)
    matrix[100, 3] = value
    save_file({"weight": matrix}, tmp_path / "adapter.safetensors")
    with pytest.raises(InputError, match=r"adapter\.safetensors: weight has values that are not finite"):
        build_split(tmp_path / "out", wide_pair, init=f"file:{tmp_path / 'adapter.safetensors'}")
    assert not (tmp_path / "out").exists()
