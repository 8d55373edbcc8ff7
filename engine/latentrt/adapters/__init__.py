"""LoRA files: read, matched with a model's weights, and merged into them."""
