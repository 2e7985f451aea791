"""Adapters: merged into their model, taken out of a Megatron checkpoint, or out of the difference of two models."""
