"""The state of a bare module as trainers save it: FSDP shards and plain distributed checkpoints."""
