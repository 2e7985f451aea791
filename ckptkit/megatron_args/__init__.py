"""How Megatron writes a model down: Megatron-LM's `args` and Megatron-Bridge's model providers."""
