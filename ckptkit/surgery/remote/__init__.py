"""What makes a split Llama load with `trust_remote_code`: files that are copied into every checkpoint."""
