"""The parts of an HTML page: valid, without anything that has to be loaded."""

from page_kit import Links

from vlmtune.html_page import document, section, table, tiles


def test_a_page_needs_no_other_file() -> None:
    page = document(
        "1 < 2", [section("Rows", "<p>3 rows</p>"), "", tiles([("3", "rows", "of 4")])], style="p {}"
    )
    links = Links(page)
    assert links.targets == []
    assert links.tags.count("section") == 1
    assert "<title>1 &lt; 2</title>" in page
    assert "url(" not in page and "@import" not in page
    assert page.index("p {}") < page.index("<body>")
    assert "\n\n" not in page[page.index("<main>") :]


def test_a_table_has_a_head_only_if_it_is_named() -> None:
    rows = ["<td>1</td><td>2</td>"]
    assert table(["a", "b"], rows).count("<tr>") == 2
    assert "<th>" not in table([], rows)
