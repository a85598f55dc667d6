"""Every bad record is named, with the field at fault, and its neighbours are kept."""

import json
from pathlib import Path
from typing import Any

import pytest
from formats_kit import ANSWERED, ASKED, HELLO, Row, read, write_lines


def say(*turns: tuple[str, Any], **more: Any) -> Row:
    return {"messages": [{"role": role, "content": content} for role, content in turns], **more}


BAD_ROWS: dict[str, tuple[Any, str]] = {
    "broken": ('{"instruction": "a", "output" "b"}', "not JSON at column 31: Expecting ':' delimiter"),
    "cut off": ('{"instruction": "a", "output": "b"', "not JSON at column 35: Expecting ',' delimiter"),
    "two rows on a line": (
        '{"instruction": "a", "output": "b"} {}',
        "not JSON at column 36: more text after the end of the row",
    ),
    "NaN": ('{"instruction": "a", "output": "b", "score": NaN}', "NaN is not JSON"),
    "minus Infinity": ('{"instruction": "a", "output": "b", "score": [-Infinity]}', "-Infinity is not JSON"),
    "doubled key": (
        '{"instruction": "a", "output": "b", "output": "c"}',
        "field 'output' stands twice in one object",
    ),
    "doubled inner key": (
        '{"messages": [{"role": "user", "role": "user", "content": "a"}]}',
        "field 'role' stands twice",
    ),
    "deep": ("[" * 100_000, "nested too deep"),
    "huge number": (
        '{"instruction": "a", "output": "b", "n": ' + "9" * 5000 + "}",
        "JSON that cannot be read",
    ),
    "half a character": (
        '{"instruction": "a", "output": "\\ud83d"}',
        "'output' holds half a character (\\ud83d without its pair)",
    ),
    "a list": ([HELLO], "the row must be an object with named fields, not a list"),
    "a string": ('"hello"', "the row must be an object with named fields, not a string"),
    "null": ("null", "the row must be an object with named fields, not null"),
    "unknown fields": (
        {"colour": "a", "size": "b"},
        "no known row format: it needs 'messages', 'conversations', or 'instruction'",
    ),
    "no instruction": (
        {"input": "a", "output": "b"},
        "looks like an instruction row, but has no 'instruction' (its fields: input, output, group)",
    ),
    "no output": ({"instruction": "a"}, "instruction row without 'output'"),
    "null output": ({"instruction": "a", "output": None}, "'output' must be a non-empty string, not null"),
    "boolean output": (
        {"instruction": "a", "output": True},
        "'output' must be a non-empty string, not a boolean",
    ),
    "empty output": (
        {"instruction": "a", "output": " "},
        "'output' must be a non-empty string, not an empty one",
    ),
    "empty instruction": ({"instruction": "", "output": "b"}, "'instruction' must be a non-empty string"),
    "system object": ({**HELLO, "system": {}, "input": ["x"]}, "'input' must be a string, not a list"),
    "null messages": ({"messages": None}, "'messages' must be a list of turns, not null"),
    "no turns": ({"messages": []}, "the conversation has no turns"),
    "text messages": ({"messages": "hello"}, "'messages' must be a list of turns, not a string"),
    "no completion": ({"prompt": []}, "prompt/completion row without 'completion'"),
    "text turn": (
        {"messages": ["hello"]},
        "messages[0] must be an object with a role and a text, not a string",
    ),
    "no role": ({"messages": [{"content": "a"}]}, "messages[0] has no 'role'"),
    "no content": ({"messages": [{"role": "user"}]}, "messages[0] has no 'content'"),
    "no value": ({"conversations": [{"from": "human"}]}, "conversations[0] has no 'value'"),
    "unknown role": (
        say(("user", "a"), ("tool", "b")),
        "messages[1].role is 'tool': calls of tools are not supported",
    ),
    "number role": (
        {"conversations": [{"from": 3, "value": "a"}]},
        "conversations[0].from is 3: it must be one of user, human",
    ),
    "boolean content": (
        say(("user", "a"), ("assistant", True)),
        "messages[1].content must be a string or a list of parts, not a boolean",
    ),
    "null content": (
        say(("user", "a"), ("assistant", None)),
        "messages[1].content must be a string or a list of parts, not null",
    ),
    "number text": (
        say(("user", [{"type": "text", "text": 3}]), ("assistant", "b")),
        "messages[0].content[0].text must be a string",
    ),
    "video": (say(("user", [{"type": "video"}]), ("assistant", "b")), "1 <video> mark but 0 videos"),
    "audio": (say(("user", [{"type": "audio"}]), ("assistant", "b")), "messages[0].content[0] must be"),
    "two users": (
        say(("user", "a"), ("user", "b"), ("assistant", "c")),
        "messages[1] is a second user turn in a row",
    ),
    "two assistants": (
        say(("user", "a"), ("assistant", "b"), ("assistant", "c")),
        "messages[2] is a second assistant turn in a row",
    ),
    "assistant first": (
        say(("assistant", "a"), ("user", "b")),
        "messages[0] is an assistant turn with no user turn before it",
    ),
    "user last": (
        say(("user", "a"), ("assistant", "b"), ("user", "c")),
        "messages[2], the last turn, is the user's",
    ),
    "no assistant": (say(("user", "a")), "messages[0], the last turn, is the user's"),
    "late system": (
        say(("user", "a"), ("system", "b"), ("assistant", "c")),
        "messages[1] is a system turn: only the first",
    ),
    "only system": (say(("system", "a")), "the conversation has only a system turn"),
    "empty answer": (
        say(("user", "a"), ("assistant", "  ")),
        "messages[1] is empty: there is nothing to learn",
    ),
    "empty question": (say(("user", []), ("assistant", "a")), "messages[0] is empty: say or show something"),
    "image in answer": (
        say(("user", "a"), ("assistant", "<image> b"), images=["a.png"]),
        "messages[1] is a turn of the assistant and holds an",
    ),
    "mark, no image": (say(("user", "<image> a"), ("assistant", "b")), "1 <image> mark but 0 images"),
    "two images, one mark": (
        say(("user", "<image> a"), ("assistant", "b"), images=["a.png", "b.png"]),
        "1 <image> mark but 2 images",
    ),
    "one image, two marks": (
        say(("user", "<image><image> a"), ("assistant", "b"), images=["a.png"]),
        "2 <image> marks but 1 image:",
    ),
    "inline and list": (
        say(("user", [{"type": "image", "image": "a.png"}]), ("assistant", "b"), images=["a.png"]),
        "0 <image> marks but 1 image",
    ),
    "image and images": (
        {**HELLO, "image": "a.png", "images": ["a.png"]},
        "the row has both 'image' and 'images': keep one",
    ),
    "number image": ({**HELLO, "image": 3}, "image must be a path or bytes, not a number"),
    "null among images": (
        {**HELLO, "images": ["a.png", None]},
        "images[1] must be a path or bytes, not null",
    ),
    "empty image": ({**HELLO, "image": ""}, "image path is empty"),
    "NUL in image": ({**HELLO, "image": "a\0.png"}, "holds characters that no file name has"),
    "data URI": ({**HELLO, "image": "data:text/plain,hello"}, "image is a data: URI"),
    "dots": ({**HELLO, "image": "../outside.png"}, "image path ../outside.png leaves the folder"),
    "inner dots": ({**HELLO, "image": "sub/../../outside.png"}, "leaves the folder"),
    "absolute": ({**HELLO, "image": "/etc/passwd"}, "image path /etc/passwd leaves the folder"),
    "file URI": ({**HELLO, "image": "file:///etc/passwd"}, "image path /etc/passwd leaves the folder"),
    "sibling": ({**HELLO, "image": "../data2/x.png"}, "leaves the folder"),
    "link": ({**HELLO, "image": "link.png"}, "image path link.png leaves the folder"),
    "linked folder": ({**HELLO, "image": "links/outside.png"}, "leaves the folder"),
    "URL": (
        {**HELLO, "image": "HTTPS://example.com/a.png"},
        "is remote: download it, or give --allow_remote_images",
    ),
    "bucket": (
        {**HELLO, "image": "s3://other/a.png"},
        "is remote: copy it to the data, or give --allow_remote_images",
    ),
    "broken URI": ({**HELLO, "image": "s3://[x/a.png"}, "Invalid IPv6 URL"),
    "no group": (
        {"instruction": "a", "output": "b", "group": None},
        "field 'group' (--group_by) is missing or empty",
    ),
    "object group": (
        {"instruction": "a", "output": "b", "group": {}},
        "field 'group' (--group_by) must be a plain value, not an object",
    ),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_bad_line_is_named_and_its_neighbours_kept(case: str, linked_folder: Path) -> None:
    bad, reason = BAD_ROWS[case]
    if isinstance(bad, dict) and "group" not in bad:
        bad = {**bad, "group": "g"}
    good = {**HELLO, "group": "g"}
    path = write_lines(linked_folder / "rows.jsonl", good, "", bad, good)
    before, row, after = read(path, group_by="group")
    assert (row["source"], row["messages"], row["images"], row["group"]) == (f"{path}:3", [], [], None)
    assert reason in row["error"]
    assert "\n" not in row["error"]
    for neighbour, line in ((before, 1), (after, 4)):
        assert neighbour == {
            "source": f"{path}:{line}",
            "messages": [ASKED, ANSWERED],
            "images": [],
            "group": "g",
            "error": None,
        }


@pytest.mark.parametrize("case", [name for name, (bad, _) in BAD_ROWS.items() if not isinstance(bad, str)])
def test_bad_item_of_an_array_is_named_and_its_neighbours_kept(case: str, linked_folder: Path) -> None:
    bad, reason = BAD_ROWS[case]
    if isinstance(bad, dict) and "group" not in bad:
        bad = {**bad, "group": "g"}
    path = linked_folder / "rows.json"
    path.write_text(json.dumps([{**HELLO, "group": "g"}, bad, {**HELLO, "group": 2}]))
    rows = read(path, group_by="group")
    assert [(row["source"], row["group"]) for row in rows] == [
        (f"{path}[0]", "g"),
        (f"{path}[1]", None),
        (f"{path}[2]", "2"),
    ]
    assert reason in rows[1]["error"]
