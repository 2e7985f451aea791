"""Values of options that are defined in modules too heavy for `--help`; a test compares them with their sources."""

from __future__ import annotations

FORMATS = ("hf", "packed", "torch", "torch_dist")
LAYOUTS = ("full", "text", "legacy")
EXPERTS = ("grouped", "sequential")
HEADS = ("value",)
HASHED = ("tensors", "files")
