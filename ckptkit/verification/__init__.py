"""Proving that two checkpoints are one model."""

from ckptkit.verification.verify import verify

__all__ = ["verify"]
