"""The frozen, quantised base model and the LoRA adapter on it."""
