"""Real Megatron-Core models built from a `ModelConfig`, one rank at a time.

Modules here import torch and megatron-core when they are imported: import them inside the function that needs them.
"""
