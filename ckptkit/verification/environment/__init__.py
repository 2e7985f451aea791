"""What this machine and its packages can run."""
