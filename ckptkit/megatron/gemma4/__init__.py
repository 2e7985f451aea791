"""What Gemma 4 needs beyond megatron-core's modules."""
