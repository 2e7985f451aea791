"""Deltas: made from two checkpoints of a model in any formats, and applied to one."""
