"""Real Megatron-Core models built from a `ModelConfig`, one rank at a time.

Modules here import torch and megatron-core when they are imported: import them inside the function that needs them.
"""

DDP, FSDP2 = DP_KINDS = ("ddp", "fsdp2")
"""Ways to make replicas: megatron-core's DistributedDataParallel, and torch's `fully_shard`."""
