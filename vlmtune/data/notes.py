"""How data was read, in lines for people: what nothing uses, and what is read otherwise than it stands."""


def unused_line(counts: dict[str, int]) -> str:
    """`field id (20 rows), field weight (3 rows)`.

    Args:
        counts: the rows that have each of them.
    """
    return ", ".join(f"{name} ({_rows(count)})" for name, count in counts.items())


def note_lines(notes: dict[str, int]) -> list[str]:
    """Notes, each with the number of rows that it is about, if that is known."""
    return [f"{text} ({_rows(rows)})" if rows else text for text, rows in notes.items()]


def _rows(count: int) -> str:
    return f"{count:,} row" + ("" if count == 1 else "s")
