"""Runs whose iterations are converted when they are finished: `ckptkit watch`."""
