"""Checkpoint surgery: new models out of the layers of others."""
