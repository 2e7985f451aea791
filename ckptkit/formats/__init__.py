"""What lies on disk: one module for each container."""
