"""A Hugging Face checkpoint in transformers: the reference for the logits of a model."""

from __future__ import annotations

import contextlib
import gc
import re
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ckptkit.errors import InputError, UnsupportedError, VerificationError
from ckptkit.families.gemma4 import GEMMA4_TEXT
from ckptkit.families.split_llama import ARCHITECTURE, AUTO_MAP
from ckptkit.formats.json_files import read_json
from ckptkit.io.stores.mirror import fetch_folder
from ckptkit.steps import Counted, Step, Tell, nobody
from ckptkit.tables.prediction import count_in_hf
from ckptkit.verification.ranks.adapters import with_peft
from ckptkit.verification.ranks.jobs import LogitsJob
from ckptkit.verification.reports.report import installed_versions
from ckptkit.verification.rounding import round_model
from ckptkit.verification.runs import Run, run_by_length, save_logits, save_probes, tokens_to_run

if TYPE_CHECKING:
    import torch

    from ckptkit.verification.routing import Record

OTHER_ATTENTION = "sdpa"
"""The attention of a second run; the first run is eager."""
OUR_CODE = (*AUTO_MAP.values(), *GEMMA4_TEXT.value_directory.auto_map.values())
"""Modules and classes, as `auto_map` names them, that directories bring along and that are ours here."""
TOKENS_PER_PASS = 8192
"""Tokens that go through the model at a time; at least one sequence."""


def run_reference(job: LogitsJob, tell: Tell = nobody) -> Run:
    """Run a Hugging Face directory over the tokens.

    Args:
        job: The tokens to run and the results to keep; it has no grid here.
        tell: Told what it is at.

    Raises:
        InputError: The directory is damaged, or weights are missing, unexpected or mis-shaped.
        UnsupportedError: This transformers has no such class, or its routing cannot be replayed.
        VerificationError: There is no memory for it, or the device failed.
    """
    return Run(config=job.run, **with_model(job, lambda model: _ReferenceRun(model, job, tell).run(), tell))


def with_model(job: LogitsJob, run: Callable[[Any], dict[str, Any]], tell: Tell = nobody) -> dict[str, Any]:
    """Loads the model of a job, rounded as it says, and does something with it.

    Args:
        job: The checkpoint, and how it runs.
        run: Gets the model, and returns fields of an answer.
        tell: Told what it is at.

    Returns:
        These fields, with `versions` and `seconds`.

    Raises:
        CkptkitError: As `load_model`, or it could not be run.
    """
    start = time.monotonic()
    tell(Step("importing transformers"))
    import torch
    import transformers

    from ckptkit.verification.delta_nets import without_kernels
    from ckptkit.verification.double_precision import precision

    tell(Step("loading"))
    dtype = getattr(torch, job.run.dtype)
    model = load_model(job.checkpoint, dtype, job.run.device)
    rounds = job.rounded if job.adapter is None or not job.adapter.merged else {}
    if rounds:
        round_model(model, rounds, job.checkpoint)
    if job.adapter is not None:
        model = with_peft(model, job.adapter, dtype)
    if job.rounded and not rounds:  # what the candidate stores was rounded with the adapter in it
        round_model(model, job.rounded, job.checkpoint)
    loaded = time.monotonic()
    try:
        with _quiet(transformers), precision(job.run.dtype), without_kernels(model, dtype, job.run.device):
            answer = run(model)  # quiet: it warns of kernels that are not installed
    except (MemoryError, RuntimeError) as error:
        raise VerificationError(f"transformers could not run it ({_line(error)})", where=job.checkpoint) from error
    finally:
        del model
        gc.collect()
        if job.run.device != "cpu":
            torch.cuda.empty_cache()
    seconds = {"load": loaded - start, "run": time.monotonic() - loaded}
    return {**answer, "versions": installed_versions(), "seconds": seconds}


def use_attention(model: Any, name: str) -> bool:
    """Switches a model of transformers to an implementation of attention. False, if it has no such one."""
    try:
        model.set_attn_implementation(name)
    except (AttributeError, ImportError, NotImplementedError, ValueError):
        return False
    return True


def load_model(path: str | Path, dtype: torch.dtype, device: str = "cpu") -> Any:
    """The model that config.json's `architectures` names, in evaluation mode, with eager attention and experts.

    `from_pretrained` fills missing weights with random values and continues. Here a missing weight is an error.

    Raises:
        InputError: The directory is damaged, or weights are missing, unexpected or mis-shaped.
        UnsupportedError: This transformers has no such class.
        VerificationError: There is no memory for it.
    """
    import transformers

    fetch_folder(path)
    name = architecture_of(Path(path))
    found = _class(name)
    if found is None:
        raise UnsupportedError(f"transformers {transformers.__version__} has no {name}", where=path)
    # Straight onto the device where transformers can: a model in fp32 may be larger than what the host has left.
    direct = {"device_map": {"": device}} if device != "cpu" and find_spec("accelerate") else {}
    with _quiet(transformers):
        try:
            model, info = found.from_pretrained(
                str(path),
                dtype=dtype,
                attn_implementation="eager",
                experts_implementation="eager",
                local_files_only=True,
                output_loading_info=True,
                **direct,
            )
            model.to(device)
        except Exception as error:  # what config.json may hold makes transformers raise anything
            # Only the text of torch's error distinguishes a lack of memory from a tensor of the wrong shape.
            kind = VerificationError if isinstance(error, MemoryError) or "memory" in str(error) else InputError
            raise kind(f"transformers cannot load it ({_line(error)})", where=path) from error
    kinds = ("missing_keys", "unexpected_keys", "mismatched_keys")
    problems = {kind.replace("_", " "): sorted(map(str, info.get(kind) or [])) for kind in kinds}
    # Released models have these layers, no class of transformers does, and no logits depend on them.
    layers = getattr(model.config.get_text_config(), "num_hidden_layers", 0)
    problems["unexpected keys"] = [name for name in problems["unexpected keys"] if not count_in_hf([name], layers)]
    texts = [f"{kind}: {', '.join(names[:4])}" for kind, names in problems.items() if names]
    if texts:
        raise InputError(f"weights do not fit {name}: {'; '.join(texts)}", where=path)
    return model.eval()


_PYTHON = re.compile(r"\b[A-Z]\w*(?:Error|Exception): |\bValue error, |\. Errors: .*|<class '(?P<name>\w+)'>")


def _line(error: BaseException) -> str:
    """The message of a library's error, in one line and without the names of Python's classes."""
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    text = _PYTHON.sub(lambda match: match["name"] or "", " ".join(text.split()))
    return text[:300] or type(error).__name__


def _class(name: str) -> Any:
    """The class of an architecture, or None. Where transformers has none it is ours: code beside weights is not run."""
    import transformers

    if (found := getattr(transformers, name, None)) is not None:
        return found
    modules = (module for path in OUR_CODE for module, _, known in [path.partition(".")] if known == name)
    module = next(modules, None)
    return None if module is None else getattr(import_module(f"ckptkit.surgery.remote.{module}"), name)


def architecture_of(path: Path) -> str:
    """The class that config.json names.

    Raises:
        InputError: It names no class, or has a layout that does not load by itself.
    """
    try:
        raw = read_json(path / "config.json")
    except InputError as error:
        raise InputError(f"cannot read config.json ({error.what})", where=path) from None
    names = raw.get("architectures")
    if not isinstance(names, list) or not names:
        raise InputError("config.json names no architecture", where=path, hint='it needs e.g. "architectures": ["..."]')
    if names[0] == ARCHITECTURE and "first_config" not in raw:
        hint = "ckptkit convert it with --to hf, which makes it self-contained"
        raise InputError("the legacy layout of a split Llama does not load by itself", where=path, hint=hint)
    return str(names[0])


class _ReferenceRun:
    """A loaded model and what to keep of a run."""

    def __init__(self, model: Any, job: LogitsJob, tell: Tell) -> None:
        from ckptkit.verification.prediction import Prediction
        from ckptkit.verification.probes import Recorder, hf_prediction_sites, hf_sites
        from ckptkit.verification.routing import Record, hf_routers, read_experts

        self.model, self.job = model, job
        self.counted = Counted("running", tokens_to_run(job.rows, job.greedy, again=bool(job.again)), "tokens", tell)
        count, rounded = job.prediction, job.rounded
        self.prediction = Prediction(model, job.checkpoint, count, rounded) if count else None
        sites = hf_sites(model) if job.probes else {}
        if job.probes and self.prediction is not None:
            sites |= hf_prediction_sites(self.prediction.model, self.prediction.first)
        self.recorder = Recorder(sites, job.whole_layers)
        self.record = Record()
        further = [] if self.prediction is None else [layer.mtp_block for layer in self.prediction.model.layers]
        self.routers = hf_routers(model, further) if job.routing or job.replay else {}
        self.experts = read_experts(job.replay)

    def run(self) -> dict[str, Any]:
        """The fields of `Run` that a run gives."""
        import torch

        from ckptkit.verification.probes import hf_head

        job = self.job
        with torch.no_grad():
            rows, groups = run_by_length(job.rows, lambda tokens: self._continue(tokens, job.greedy), self._forward)
        save_logits(job.output, groups)
        if job.probes:
            save_probes(Path(job.probes), self.recorder.states)
        if job.routing:
            self.record.save(Path(job.routing))
        feeds = {place: site.feeds for place, site in self.recorder.sites.items()} | {"head": hf_head(self.model)}
        if job.again:
            self._run_again(rows, job.again)
        return {"rows": rows, **job.files, "feeds": feeds}

    def _run_again(self, rows: list[list[int]], output: str) -> None:
        """Logits of the same rows with another implementation of attention, if the model has one.

        Gated DeltaNets, which have no other, round elsewhere.
        """
        import torch

        from ckptkit.verification.delta_nets import rounded_once

        if not use_attention(self.model, OTHER_ATTENTION):
            return
        if self.prediction is not None:
            self.prediction.use_attention(OTHER_ATTENTION)
        with torch.no_grad(), rounded_once(self.model):
            _, groups = run_by_length(rows, lambda tokens: tokens, self._routed_logits)
        save_logits(output, groups)

    def _forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits of the run that counts."""
        with self.recorder.over(tokens.size(1)):
            return self._routed_logits(tokens, self.record)

    def _routed_logits(self, tokens: torch.Tensor, record: Record | None = None) -> torch.Tensor:
        """Logits, with the experts that are prescribed."""
        from ckptkit.verification.routing import hf_routing

        def routed(batch: torch.Tensor, first: int) -> AbstractContextManager[None]:
            experts = self.experts.get(batch.size(1))
            part = None if experts is None else {layer: e[first : first + len(batch)] for layer, e in experts.items()}
            return hf_routing(self.routers, len(batch), batch.size(1), record, part)

        return self._logits(tokens, routed)

    def _logits(
        self, tokens: torch.Tensor, around: Callable[[torch.Tensor, int], AbstractContextManager[None]]
    ) -> torch.Tensor:
        """What is kept of the logits, a few rows at a time, each pass inside of `around`.

        Returns:
            fp32 [batch, sequence, vocabulary] in host memory, or scores in place of the vocabulary.
        """
        import torch

        rows, parts = max(1, TOKENS_PER_PASS // tokens.size(1)), []
        for first in range(0, len(tokens), rows):
            batch = tokens[first : first + rows].to(self.model.device)
            with around(batch, first):
                parts.append(self._kept(self._outputs(batch).float(), batch))
            self.counted.add(batch.numel())
        return torch.cat(parts)

    def _outputs(self, batch: torch.Tensor) -> torch.Tensor:
        """What is compared: the outputs of the model, or of its last layer of multi-token prediction."""
        return outputs_of(self.model, batch) if self.prediction is None else self.prediction.logits(batch)

    def _kept(self, logits: torch.Tensor, batch: torch.Tensor) -> torch.Tensor:
        """Logits, or their scores for the tokens that follow, in host memory."""
        if not self.job.scored:
            return logits.cpu()
        from ckptkit.verification.rollouts.scores import score

        return score(logits, batch.roll(-1, -1), self.job.scored)

    def _continue(self, tokens: torch.Tensor, steps: int) -> torch.Tensor:
        """`tokens` with the `steps` most likely ones appended; the whole row runs again for each, nothing is cached."""
        import torch

        for _ in range(steps):
            last = self._logits(tokens, lambda batch, first: contextlib.nullcontext())[:, -1]
            tokens = torch.cat((tokens, last.argmax(-1)[:, None]), dim=1)
        return tokens


def outputs_of(model: Any, batch: torch.Tensor) -> torch.Tensor:
    """The outputs of the head at every position, [batch, sequence, outputs].

    Classifiers of sequences themselves return one position only.
    """
    if not hasattr(model, "score"):
        logits: torch.Tensor = model(input_ids=batch, use_cache=False).logits
        return logits
    states = getattr(model, model.base_model_prefix)(input_ids=batch, use_cache=False).last_hidden_state
    values: torch.Tensor = model.score(states)
    return values


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
