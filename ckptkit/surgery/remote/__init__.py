"""What makes a checkpoint load with `trust_remote_code`: files that are copied into its directory."""
