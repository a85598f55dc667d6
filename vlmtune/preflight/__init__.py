"""The preflight: reports on the data, its lengths and the memory of a run before a GPU is needed."""
