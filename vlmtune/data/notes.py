"""Lines for people about how data was read: fields that are not used, values that are changed."""


def unused_line(counts: dict[str, int]) -> str:
    """`field id (20 rows), field weight (3 rows)`.

    Args:
        counts: number of rows that have each field.
    """
    return ", ".join(f"{name} ({_rows(count)})" for name, count in counts.items())


def note_lines(notes: dict[str, int]) -> list[str]:
    """Notes, each with the number of rows that it is about, if that is known."""
    return [f"{text} ({_rows(rows)})" if rows else text for text, rows in notes.items()]


def _rows(count: int) -> str:
    return f"{count:,} row" + ("" if count == 1 else "s")
