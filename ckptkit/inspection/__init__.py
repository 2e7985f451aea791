"""Looking at checkpoints of any layout: what they hold, whether they are sound, and where two differ."""
