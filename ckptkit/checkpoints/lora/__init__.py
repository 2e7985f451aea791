"""LoRA adapters as checkpoints: their canonical view is a pair of factors for each Hugging Face linear layer."""
