"""What is shown and published holds no secrets, no control characters and no local paths."""

import json
from pathlib import Path

import pytest

from vlmtune.config.settings import Settings
from vlmtune.console import TrialTable, say
from vlmtune.errors import USER_ERROR, ConfigError, plain_user_errors
from vlmtune.output import settings_yaml
from vlmtune.shown_text import printable, redacted, shown_name, with_secrets_of
from vlmtune.storage import write_json

SECRET = "abcSECRET/+123"


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        (f"s3://KEY:{SECRET}@bucket/data", "s3://bucket/data"),
        ("s3://KEY:abc%2FSECRET@bucket/data?region=x", "s3://bucket/data?region=x"),
        ("https://abcSECRET@host/a.jpg", "https://host/a.jpg"),
        ("s3://b/a?secret_key=abcSECRET&region=x", "s3://b/a?secret_key=***&region=x"),
        ("https://h/a?X-Amz-Signature=abcSECRET", "https://h/a?X-Amz-Signature=***"),
        ("https://h/a?sig=abcSECRET&key=1", "https://h/a?sig=***&key=1"),
        ("gs://bucket/a@b", "gs://bucket/a@b"),
        ("s3://bucket/x:y@z", "s3://bucket/x:y@z"),
        ("mail me@host", "mail me@host"),
    ],
)
def test_secrets_of_uris_are_left_out(uri: str, shown: str) -> None:
    assert redacted(uri) == shown
    assert redacted(f'"{uri}" and {uri} too') == f'"{shown}" and {shown} too'


def test_no_file_of_ours_holds_them(tmp_path: Path) -> None:
    settings = Settings.from_flags(
        {"data_path": f"s3://KEY:{SECRET}@b/d", "lora_r": 4, "storage_path": f"s3://KEY:{SECRET}@b/s"}
    )
    assert "SECRET" not in settings_yaml(settings) and "s3://b/d" in settings_yaml(settings)
    write_json(str(tmp_path / "a.json"), {"x": [{"path": f"s3://KEY:{SECRET}@b/d"}], "n": 1.5})
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": [{"path": "s3://b/d"}], "n": 1.5}


def test_messages_hold_neither_secrets_nor_escapes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end, plain_user_errors():
        raise ConfigError(f"s3://K:{SECRET}@b: \x1b[2J\x1b]0;title\x07 \r\u202egone: tab\tstays")
    assert end.value.code == USER_ERROR
    assert capsys.readouterr().err == (
        "error: s3://b: \\x1b[2J\\x1b]0;title\\x07 \\r\\u202egone: tab\tstays\n"
    )
    say("한국어 \x9b31m two\nlines")
    assert capsys.readouterr().out == "한국어 \\x9b31m two\nlines\n"
    assert printable("¿qué? 世界") == "¿qué? 世界"


def test_values_are_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    table = TrialTable(["lora_target_modules", "[/x]"], "eval_loss")
    table.update(0, state="running", lora_target_modules="[qv]_proj[/x]", **{"[/x]": "[link=file:///]a"})
    table.console.print(table.table())
    shown = capsys.readouterr().out
    assert "[qv]_proj[/x]" in shown and "[link=file:///]a" in shown


def test_names_in_place_of_local_paths() -> None:
    assert [shown_name(path) for path in ("/home/me/data/", "owner/name", "s3://K:S@b/c", "data.jsonl")] == [
        "data",
        "owner/name",
        "s3://b/c",
        "data.jsonl",
    ]


def test_secrets_come_back_from_what_was_given() -> None:
    given = ["/local", "s3://other/x", "s3://KEY:SECRET@bucket/data?region=r&session_token=T"]
    kept = redacted("s3://KEY:SECRET@bucket/data/a%20b.jpg?region=r&session_token=T")
    assert "SECRET" not in kept and "T" not in kept.partition("?")[2].replace("***", "")
    whole = "s3://KEY:SECRET@bucket/data/a%20b.jpg?region=r&session_token=T"
    assert with_secrets_of(kept, given) == whole
    assert with_secrets_of("s3://other/a.jpg", given) == "s3://other/a.jpg"
    assert with_secrets_of("/local/a.jpg", given) == "/local/a.jpg"
