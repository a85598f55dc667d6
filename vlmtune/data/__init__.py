"""From files to padded batches: formats, split, prepare, tokenize, order, collate."""

import os

# Ray Data by default asks for a finished task's numbers in another thread, and a worker waits 0.1 s longer
# for its next task. Here, because
# it is read when ray.data is imported.
os.environ.setdefault("RAY_DATA_METADATA_PREFETCH_ON_THREAD", "0")
