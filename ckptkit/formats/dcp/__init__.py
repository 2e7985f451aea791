"""The container of torch.distributed.checkpoint: chunks of tensors in files, and a pickled index."""
