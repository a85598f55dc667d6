"""`ExampleCache`: keeps examples in memory, because all trials of an engine need the same ones."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from vlmtune.data.encoded_example import EncodedExample
from vlmtune.data.examples import read_examples
from vlmtune.data.store import Store

CACHE_BYTES = 2 * 2**30  # memory for examples


class ExampleCache:
    """Keeps the most recently used examples in memory. A thread reads the next ones ahead.

    Rows of all resolutions of a store are numbered one after another, see `Store.first_number`.

    Attributes:
        bytes: memory that the examples take.
    """

    def __init__(self, store: Store) -> None:
        self.store = store
        self.examples: OrderedDict[int, EncodedExample] = (
            OrderedDict()
        )  # the most recently used ones are last
        self.bytes = 0
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="rows")
        self._prefetch: Future[None] | None = None

    def get(self, row_numbers: Sequence[int]) -> dict[int, EncodedExample]:
        """The examples of these rows, by row number."""
        if self._prefetch is not None:
            self._prefetch.result()
            self._prefetch = None
        wanted = list(dict.fromkeys(row_numbers))
        self._read(wanted)
        for row in wanted:
            self.examples.move_to_end(row)
        examples = {row: self.examples[row] for row in wanted}
        while self.bytes > CACHE_BYTES and len(self.examples) > len(wanted):
            self.bytes -= _bytes(self.examples.popitem(last=False)[1])
        return examples

    def prefetch(self, rows: Sequence[int]) -> None:
        """Start to read these rows in the thread. The next `get` waits for it."""
        self._prefetch = self._reader.submit(self._read, list(dict.fromkeys(rows)))

    def _read(self, rows: Sequence[int]) -> None:
        count = self.store.meta.rows
        missing = [row for row in rows if row not in self.examples]
        for position, store in enumerate(self.store.resolutions):
            own = [row for row in missing if row // count == position]
            for row, example in zip(own, read_examples(store, [row % count for row in own]), strict=True):
                self.examples[row] = example
                self.bytes += _bytes(example)


def _bytes(example: EncodedExample) -> int:
    tensors = sum(tensor.nbytes for tensor in example.tensors.values())
    return int(example.input_ids.nbytes + example.kinds.nbytes + tensors)
