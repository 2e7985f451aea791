"""Values of options that are defined in modules too heavy for `--help`; a test compares them with their sources."""

from __future__ import annotations

MODEL_FORMATS = ("hf", "packed", "torch", "torch_dist")
FORMATS = (*MODEL_FORMATS, "peft")
PRECISIONS = ("float32", "float64")
NEW_ROWS = ("mean", "pieces", "zeros", "normal")
EXPERTS = ("grouped", "sequential")
PARTS = ("model", "adapter")
HASHED = ("tensors", "files")
CASTS = ("bfloat16", "float16", "float32", "float64")
FULL, TEXT, LEGACY = "full", "text", "legacy"
LAYOUTS = (FULL, TEXT, LEGACY)
HEADS = ("value",)
ADAPTER_LAYOUTS = ("fused", "canonical", "peft")
MEGATRON_MODELS = GPT, HYBRID = ("gpt", "hybrid")
RELEASES = CORE_0_16, CORE_0_19 = ("0.16", "0.19")
