"""Processes that run megatron-core: the pool that starts them, the jobs that they take, and what they report."""
