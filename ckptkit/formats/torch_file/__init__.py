"""Files of `torch.save`, zip archives with a pickle inside, read and written without torch and without running code."""
