"""Adapters: merging them into their model, and taking them out of a Megatron checkpoint."""
