"""From files to padded batches: formats, split, prepare, tokenize, order, collate."""

import os

# By default Ray Data fetches a finished task's statistics in another thread, and the worker waits 0.1 s
# longer for its next task. Set here, because Ray reads it when ray.data is imported.
os.environ.setdefault("RAY_DATA_METADATA_PREFETCH_ON_THREAD", "0")
