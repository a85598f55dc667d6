"""Find and train the best LoRA adapter of a vision-language model for your own images, questions and
answers."""

__version__ = "0.1.0"
