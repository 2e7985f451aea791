"""What `torch.save` writes, a zip with a pickle inside: read and written without torch, and without running code."""
