"""The preflight: what to know of data, lengths and memory before a run takes a GPU."""
