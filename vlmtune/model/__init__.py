"""The frozen, quantized base model and the LoRA adapter on it."""
