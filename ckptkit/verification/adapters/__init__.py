"""Verification of a model with a LoRA adapter: beside its weights, or in them."""
