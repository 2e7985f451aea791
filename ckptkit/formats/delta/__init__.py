"""A delta: what turns one set of weights of a model into another. docs/delta.md describes the files."""
