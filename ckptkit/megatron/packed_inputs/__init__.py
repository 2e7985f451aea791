"""Models for packed inputs: sequences of different lengths in one row, without padding between them."""
