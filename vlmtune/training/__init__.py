"""One training run: what a worker does and what it reports."""
