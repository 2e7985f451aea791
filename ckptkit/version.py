"""The version of ckptkit, apart from everything that imports it."""

__version__ = "0.2.0"
