"""One conversation as token ids, the kind of each token, and image tensors; and how it is cut to a length."""

from dataclasses import dataclass, field

import numpy as np

# The kind of a token, in `EncodedExample.kinds`.
TEMPLATE, IMAGE, TEXT, ANSWER = 0, 1, 2, 3
IGNORED = -100  # the label of tokens that torch's and transformers' losses leave out


@dataclass
class EncodedExample:
    """One conversation, ready for the model but not yet cut to a length.

    Attributes:
        input_ids: `[T]` int32, image placeholders included.
        kinds: `[T]` uint8, what each token is: TEMPLATE, IMAGE, TEXT or ANSWER. The loss is on ANSWER.
        tensors: the model's other inputs, as its processor gives them for a batch of one row: pixels (uint8
            if the store holds resized pixels), image sizes, masks. A text-only row usually has none.
        token_axes: the axis of the tokens, by name, for tensors that have one and are shortened with the
            tokens.
    """

    input_ids: np.ndarray
    kinds: np.ndarray
    tensors: dict[str, np.ndarray] = field(default_factory=dict)
    token_axes: dict[str, int] = field(default_factory=dict)

    @property
    def labels(self) -> np.ndarray:
        """`[T]` int64: the id of each token that is trained on, IGNORED for the others."""
        labels = self.input_ids.astype(np.int64)
        labels[self.kinds != ANSWER] = IGNORED
        return labels

    @property
    def image_tokens(self) -> int:
        return int((self.kinds == IMAGE).sum())

    def take(self, positions: np.ndarray) -> "EncodedExample":
        """The tokens at these positions, with every tensor that runs along them."""
        tensors = {
            name: np.take(value, positions, axis=self.token_axes[name]) if name in self.token_axes else value
            for name, value in self.tensors.items()
        }
        return EncodedExample(self.input_ids[positions], self.kinds[positions], tensors, self.token_axes)

    def prompt(self) -> "EncodedExample":
        """Everything before the last answer, from which the model generates that answer."""
        answers = np.flatnonzero(self.kinds == ANSWER)
        breaks = np.flatnonzero(np.diff(answers) > 1)
        start = answers[breaks[-1] + 1] if len(breaks) else answers[0]
        return self.take(np.arange(start))


def required_length(example: EncodedExample) -> int:
    """The smallest `max_length` that holds the row's images, the template and one trained token."""
    first = int(np.argmax(example.kinds == ANSWER))
    return int((_protected(example.kinds, first)).sum()) + 1


def shorten(example: EncodedExample, max_length: int | None) -> EncodedExample:
    """Cut text, never image tokens, so that at most `max_length` tokens remain.

    Tokens are kept in this order of priority:
    1. every image token, and the template before the first answer;
    2. the start of the first answer: up to half of the length that is left, or more if the question is short;
    3. the end of the question, which is nearest to the answer;
    4. what follows the first answer, as much as fits.

    Raises:
        ValueError: `max_length` is below `required_length(example)`.
    """
    length = len(example.input_ids)
    if max_length is None or length <= max_length:
        return example
    if max_length < (required := required_length(example)):
        raise ValueError(
            f"max_length {max_length} cannot hold this row: its images and template alone need {required}"
        )
    first = int(np.argmax(example.kinds == ANSWER))
    keep = _protected(example.kinds, first)
    budget = max_length - int(keep.sum())
    question = np.flatnonzero(~keep[:first])
    later = first + np.flatnonzero(~keep[first:])
    breaks = np.flatnonzero(example.kinds[first:] != ANSWER)
    answer = int(breaks[0]) if len(breaks) else length - first
    from_answer = min(answer, max(budget - len(question), budget // 2, 1))
    from_question = min(len(question), budget - from_answer)
    keep[question[len(question) - from_question :]] = True
    keep[later[: budget - from_question]] = True
    return example.take(np.flatnonzero(keep))


def _protected(kinds: np.ndarray, first_answer: int) -> np.ndarray:
    """`[T]` bool: tokens that are never cut."""
    positions = np.arange(len(kinds))
    protected: np.ndarray = (kinds == IMAGE) | ((kinds == TEMPLATE) & (positions < first_answer))
    return protected
