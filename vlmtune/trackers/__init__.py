"""Weights & Biases, MLflow and Trackio beside TensorBoard: one run for each trial, grouped by its search."""
