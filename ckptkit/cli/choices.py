"""Values of options that are defined in modules too heavy for `--help`; a test compares them with their sources."""

from __future__ import annotations

FORMATS = ("hf", "packed", "torch", "torch_dist")
EXPERTS = ("grouped", "sequential")
HASHED = ("tensors", "files")
