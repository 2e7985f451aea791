"""Looks at checkpoints of any layout: their content, their soundness, and the differences between two of them."""
