"""Values of options that are defined in modules too heavy for `--help`; a test compares them with their sources."""

from __future__ import annotations

MODEL_FORMATS = ("hf", "packed", "torch", "torch_dist")
FORMATS = (*MODEL_FORMATS, "peft")
PRECISIONS = ("float32", "float64")
NEW_ROWS = ("mean", "pieces", "zeros", "normal")
EXPERTS = ("grouped", "sequential")
HASHED = ("tensors", "files")
