"""Many LoRA trials on one device over one frozen base."""
