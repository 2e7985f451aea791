"""Containers on disk: one module each. No module here knows a model."""
