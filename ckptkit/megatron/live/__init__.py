"""Models of a running program: their weights to and from checkpoints, each rank its own bytes."""
