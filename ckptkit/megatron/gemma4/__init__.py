"""Modules that Gemma 4 needs beyond those of megatron-core."""
