"""A Hugging Face checkpoint in transformers: the other opinion on what a model computes."""

from __future__ import annotations

import contextlib
import gc
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ckptkit.errors import InputError, UnsupportedError, VerificationError
from ckptkit.verification.report import installed_versions
from ckptkit.verification.runs import Run, run_by_length, save_logits, save_probes

if TYPE_CHECKING:
    import torch

TOKENS_PER_PASS = 8192
"""Tokens that go through the model at a time; at least one sequence."""


def run_reference(
    path: str | Path,
    rows: list[list[int]],
    *,
    dtype: str,
    device: str,
    output: Path,
    greedy: int = 0,
    probes: Path | None = None,
) -> Run:
    """Run a Hugging Face directory over the tokens.

    Args:
        path: Directory with config.json and weights.
        rows: Token ids, one list per sequence.
        dtype: torch's name of the dtype to run in.
        device: `cpu` or `cuda`.
        output: File for the logits.
        greedy: Most likely tokens to append to every row before the logits are taken.
        probes: Directory for hidden states, or None.

    Raises:
        InputError: The directory is damaged, or weights are missing, unexpected or mis-shaped.
        UnsupportedError: This transformers has no such class.
        VerificationError: There is no memory for it, or the device failed.
    """
    import torch

    start = time.monotonic()
    model = load_model(path, getattr(torch, dtype))
    loaded = time.monotonic()
    try:
        run = _run(model.to(device), rows, output, greedy, probes)
    except (MemoryError, RuntimeError) as error:
        raise VerificationError(f"transformers could not run it ({_line(error)})", where=path) from error
    finally:
        del model
        gc.collect()
        if device != "cpu":
            torch.cuda.empty_cache()
    seconds = {"load": loaded - start, "run": time.monotonic() - loaded}
    return Run(**{**run, "versions": installed_versions(), "seconds": seconds})


def load_model(path: str | Path, dtype: torch.dtype) -> Any:
    """The model that config.json's `architectures` names, in evaluation mode, with eager attention and experts.

    `from_pretrained` fills what a file lacks with random values and goes on; here that is an error.

    Raises:
        InputError: The directory is damaged, or weights are missing, unexpected or mis-shaped.
        UnsupportedError: This transformers has no such class.
        VerificationError: There is no memory for it.
    """
    import transformers

    name = _architecture(Path(path))
    if not hasattr(transformers, name):
        raise UnsupportedError(f"transformers {transformers.__version__} has no {name}", where=path)
    with _quiet(transformers):
        try:
            model, info = getattr(transformers, name).from_pretrained(
                str(path),
                dtype=dtype,
                attn_implementation="eager",
                experts_implementation="eager",
                local_files_only=True,
                output_loading_info=True,
            )
        except (OSError, ValueError, RuntimeError, MemoryError) as error:
            # torch tells a lack of memory from a tensor of the wrong shape only in the text.
            kind = VerificationError if isinstance(error, MemoryError) or "memory" in str(error) else InputError
            raise kind(f"transformers cannot load it ({_line(error)})", where=path) from error
    kinds = ("missing_keys", "unexpected_keys", "mismatched_keys")
    problems = {kind.replace("_", " "): sorted(map(str, info.get(kind) or [])) for kind in kinds}
    texts = [f"{kind}: {', '.join(names[:4])}" for kind, names in problems.items() if names]
    if texts:
        raise InputError(f"weights do not fit {name}: {'; '.join(texts)}", where=path)
    return model.eval()


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def _architecture(path: Path) -> str:
    try:
        names = json.loads((path / "config.json").read_text()).get("architectures")
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(f"cannot read config.json ({error})", where=path) from None
    if not names:
        raise InputError("config.json names no architecture", where=path, hint='it needs e.g. "architectures": ["..."]')
    return str(names[0])


def _run(model: Any, rows: list[list[int]], output: Path, greedy: int, probes: Path | None) -> dict[str, Any]:
    import torch

    from ckptkit.verification.probes import Recorder, hf_head, hf_sites

    recorder = Recorder(hf_sites(model) if probes else {})

    def forward(tokens: torch.Tensor) -> torch.Tensor:
        with recorder.over(tokens.size(1)):
            return _logits(model, tokens)

    with torch.no_grad():
        rows, groups = run_by_length(rows, lambda tokens: _continue(model, tokens, greedy), forward)
    save_logits(output, groups)
    if probes is not None:
        save_probes(probes, recorder.states)
    feeds = {place: site.feeds for place, site in recorder.sites.items()} | {"head": hf_head(model)}
    return {"rows": rows, "logits": output, "probes": probes, "feeds": feeds}


def _logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """fp32 [batch, sequence, vocabulary] in host memory."""
    import torch

    rows = max(1, TOKENS_PER_PASS // tokens.size(1))
    batches = [part.to(model.device) for part in tokens.split(rows)]
    return torch.cat([model(input_ids=batch, use_cache=False).logits.float().cpu() for batch in batches])


def _continue(model: Any, tokens: torch.Tensor, steps: int) -> torch.Tensor:
    """`tokens` with the `steps` most likely ones appended; the whole row runs again for each, nothing is cached."""
    import torch

    for _ in range(steps):
        tokens = torch.cat((tokens, _logits(model, tokens)[:, -1].argmax(-1)[:, None]), dim=1)
    return tokens


@contextlib.contextmanager
def _quiet(transformers: Any) -> Any:
    """Without the log of what was loaded: it is checked, not read."""
    logging = transformers.utils.logging
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
