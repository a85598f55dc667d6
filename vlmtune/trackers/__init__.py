"""Weights & Biases, MLflow and Trackio: each trial is a run there, and the runs of a search are a group."""
