"""What passes at the levels gradients and training, on figures that are made up."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ckptkit.formats.safetensors import read_header, tensors_of
from ckptkit.io.plan import Comparison
from ckptkit.verification.run_options import RunOptions
from ckptkit.verification.training.figures import Comparisons, TensorError, compare
from ckptkit.verification.training.judging import judge_gradients, judge_steps

GOOD = TensorError("good", error=1e-6, rms=1e-7, noise=None, largest=1.0, size=0.1, elements=100)
LOW = replace(GOOD, rms=1e-2, noise=1e-2)
EXACT, HALF = RunOptions(), RunOptions(dtype="bfloat16")


def failed(checks: Any) -> list[str]:
    return [check.name for check in checks if not check.passed]


def test_what_is_alike_passes() -> None:
    assert failed(judge_gradients(Comparisons([GOOD]), (3.0, 3.0), EXACT)) == []
    assert failed(judge_gradients(Comparisons([LOW] * 3), (3.0, 3.01), HALF, low_loss=3.005)) == []


@pytest.mark.parametrize(
    ("figures", "losses", "check", "words"),
    [
        (Comparisons([replace(GOOD, name="bad", error=2e-4), GOOD]), (3.0, 3.0), "gradients", "in bad"),
        (Comparisons([replace(GOOD, error=float("nan"))]), (3.0, 3.0), "gradients", "nan"),
        (Comparisons([GOOD], missing=["gone"]), (3.0, 3.0), "present", "none for gone"),
        (Comparisons([GOOD], surplus=["new"]), (3.0, 3.0), "present", "one for new"),
        (Comparisons([GOOD], non_finite=["nan"]), (3.0, 3.0), "finite", "not finite: nan"),
        (Comparisons([GOOD], copies=(1e-3, "norm on ranks 0 and 1")), (3.0, 3.0), "copies", "norm on ranks"),
        (Comparisons([GOOD]), (3.0, 3.001), "loss", "3.001"),
        (Comparisons([GOOD]), (3.0, float("nan")), "loss", "nan"),
        (Comparisons([]), (3.0, 3.0), "gradients", "no tensor"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_differs_is_named(figures: Comparisons, losses: Any, check: str, words: str) -> None:
    checks = judge_gradients(figures, losses, EXACT)
    assert failed(checks) == [check]
    assert words in next(c.summary for c in checks if c.name == check)


def test_the_noise_floor() -> None:
    five_times = replace(LOW, name="bad", rms=5e-2)
    assert failed(judge_gradients(Comparisons([LOW, LOW, five_times]), (3.0, 3.0), HALF, 3.0)) == ["noise floor"]
    all_of_them = [replace(LOW, rms=1.3e-2)] * 3
    assert failed(judge_gradients(Comparisons(all_of_them), (3.0, 3.0), HALF, 3.0)) == ["noise floor"]
    assert failed(judge_gradients(Comparisons([LOW]), (3.0, 3.1), HALF, 3.0)) == ["loss"]


def test_small_tensors_count_as_one() -> None:
    small = [replace(LOW, name=f"scale {i}", elements=1, rms=rms) for i, rms in enumerate((6e-2, 1e-3, 1e-3, 1e-3))]
    small = [small[0], *(replace(tensor, noise=3e-2) for tensor in small[1:])]
    assert failed(judge_gradients(Comparisons([LOW, LOW, *small]), (3.0, 3.0), HALF, 3.0)) == []
    small = [replace(tensor, rms=0.3) for tensor in small]
    checks = judge_gradients(Comparisons([LOW, LOW, *small]), (3.0, 3.0), HALF, 3.0)
    assert failed(checks) == ["noise floor"]
    assert "4 tensors of fewer than 16 elements" in checks[-1].summary


MOVED = replace(GOOD, rms=1e-6, noise=1e-6, size=0.1)
FALL = [3.0, 2.0, 1.0]


@pytest.mark.parametrize(
    ("figures", "losses", "moved", "wrong"),
    [
        ([MOVED], [FALL, FALL, FALL], [], []),
        ([MOVED], [FALL, [3.0, 2.0, 1.003], [3.0, 2.0, 1.001]], [], []),
        ([MOVED], [FALL, [3.0, 2.0, 1.005], [3.0, 2.0, 1.001]], [], ["losses"]),
        ([MOVED], [FALL, [3.0, 2.0, 1.001]], [], ["losses"]),
        ([MOVED], [[3.0, 3.1, 3.2]] * 3, [], ["losses fall"]),
        ([MOVED], [FALL] * 3, ["embedding"], ["frozen"]),
        ([replace(MOVED, rms=2e-3)], [FALL] * 3, [], ["updates"]),
        ([MOVED, MOVED, replace(MOVED, rms=2e-3)], [FALL] * 3, [], ["updates"]),
        ([MOVED, MOVED, replace(MOVED, rms=2e-3, noise=1e-3)], [FALL] * 3, [], []),
    ],
)
def test_steps(figures: list[TensorError], losses: list[list[float]], moved: list[str], wrong: list[str]) -> None:
    assert failed(judge_steps(Comparisons(figures), losses, moved, EXACT)) == wrong


@pytest.mark.parametrize(
    ("ours", "words"),
    [
        ([2.9, 2.0, 1.0], "before the first step"),
        ([3.0, 2.1, 1.0], "after 1 step the"),
        ([3.0, 2.0, 1.1], "after 2 steps the"),
    ],
)
def test_the_worst_loss_is_named_by_its_step(ours: list[float], words: str) -> None:
    checks = judge_steps(Comparisons([MOVED]), [FALL, ours, FALL], [], EXACT)
    assert words in next(check.summary for check in checks if check.name == "losses")


def test_tensors_are_compared_by_name(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    one = torch.linspace(-1, 1, 24).reshape(4, 6)
    theirs = {"same": one, "off": one, "zero": one * 0, "gone": one, "nan": one, "noisy": one * 5e-8}
    ours = {**theirs, "off": one + 1e-3, "gone": one * 0, "zero": one * 1e-3, "nan": one / 0, "noisy": one * -1.5e-7}
    low = {name: tensor + 1e-2 for name, tensor in theirs.items()}
    read = []
    for number, tensors in enumerate((theirs, ours, low)):
        path = tmp_path / f"{number}.safetensors"
        save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, path)
        read.append(tensors_of(path, read_header(path)))
    copies = [Comparison(read[0]["same"], read[1]["off"], "a copy")]
    found = compare(read[0], read[1], low=[read[2]], unused={"slot": read[0]["same"]}, copies=copies)
    assert [tensor.name for tensor in found.tensors] == ["off", "same"]
    assert found.tensors[0].error == pytest.approx(1e-3, rel=1e-3)
    assert found.tensors[0].ratio == pytest.approx(0.1, rel=1e-3)
    assert (found.missing, found.surplus, found.non_finite) == (["gone"], ["zero", "slot"], ["nan"])
    assert found.copies is not None and found.copies[1] == "a copy" and found.copies[0] == pytest.approx(1e-3, rel=1e-2)
