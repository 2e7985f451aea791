"""Quantised weights in Hugging Face directories: which tensors are codes and scales, and the numbers that they mean."""
