"""Tests of ckptkit.formats.quantised."""
