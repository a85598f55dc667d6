"""Search over LoRA settings: space, Optuna sampler, Ray Tune, results."""
