"""Where results go: nothing of anybody else's is ever deleted, and nothing is half-written."""

from pathlib import Path

import pytest

from vlmtune import output
from vlmtune.errors import ConfigError


def fill(folder: Path, *names: str) -> Path:
    folder.mkdir(parents=True)
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"content of {name}")
    return folder


def content(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): path.read_text()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_a_place_is_absolute_or_a_uri(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert output.resolve_folder("out/run", in_job=False) == str(tmp_path / "out/run")
    assert output.resolve_folder("/data/out/", in_job=True) == "/data/out"
    assert output.resolve_folder((tmp_path / "a b").as_uri(), in_job=True) == str(tmp_path / "a b")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    assert output.resolve_folder("s3://bucket/out/?region=eu-west-1", in_job=True).startswith(
        "s3://bucket/out"
    )


@pytest.mark.parametrize("path", ["out", "./out", "../out"])
def test_a_relative_place_is_refused_in_a_ray_job(path: str):
    with pytest.raises(
        ConfigError, match=r"^--output_dir .*out: inside a Ray job give an absolute path or a URI"
    ):
        output.resolve_folder(path, in_job=True)
    with pytest.raises(ConfigError, match=r"^--storage_path .*out: inside a Ray job"):
        output.resolve_folder(path, in_job=True, flag="--storage_path")


@pytest.mark.parametrize("path", ["nowhere://bucket/out", "file://otherhost/out"])
def test_a_uri_that_cannot_be_opened_is_refused(path: str):
    with pytest.raises(ConfigError, match=rf"^--output_dir {path}: cannot be opened: ") as caught:
        output.resolve_folder(path, in_job=False)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "files",
    [(), ("config.yaml",), ("search.yaml", "trials.parquet"), ("config.yaml", "metrics.json", "runs/events")],
)
def test_an_absent_or_empty_folder_and_with_overwrite_a_run_of_ours_is_claimed(
    tmp_path: Path, files: tuple[str, ...]
):
    output.claim(str(tmp_path / "absent" / "out"), overwrite=False)
    assert list((tmp_path / "absent" / "out").iterdir()) == []
    folder = fill(tmp_path / "out", *files)
    output.check_free(str(folder), overwrite=True)
    assert set(content(folder)) == set(files)  # looking deletes nothing
    output.claim(str(folder), overwrite=True)
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            ("config.yaml", "metrics.json"),
            r"holds a finished run; choose another folder, or replace it with --overwrite",
        ),
        (("search.yaml", "trials.parquet"), r"holds a finished run"),
        (("config.yaml",), r"holds an unfinished run; .*--overwrite, or resume it: --resume "),
        (("search.yaml", "tune/state.json"), r"holds an unfinished run"),
    ],
)
def test_a_run_is_kept_without_overwrite(tmp_path: Path, files: tuple[str, ...], message: str):
    folder = fill(tmp_path / "out", *files)
    before = content(folder)
    for use in (output.check_free, output.claim):
        with pytest.raises(ConfigError, match=f"^--output_dir {folder}: {message}"):
            use(str(folder), overwrite=False)
    assert content(folder) == before


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    "files",
    [
        ("thesis.tex",),
        ("metrics.json",),
        (".git/config",),
        ("photos/1.jpg", "README.md"),
        ("config.yaml", "metrics.json", "thesis.tex"),  # a run of ours to which somebody added a file
        ("config.yaml", "photos/1.jpg"),
    ],
)
def test_what_no_run_wrote_is_never_deleted(tmp_path: Path, files: tuple[str, ...], overwrite: bool):
    folder = fill(tmp_path / "out", *files)
    before = content(folder)
    for use in (output.check_free, output.claim):
        with pytest.raises(ConfigError, match=rf"^--output_dir {folder}: "):
            use(str(folder), overwrite=overwrite)
    assert content(folder) == before


def test_a_file_is_no_place(tmp_path: Path):
    (tmp_path / "out").write_text("mine")
    for path, message in (
        (tmp_path / "out", "is a file, not a folder"),
        (tmp_path / "out" / "sub", f"{tmp_path}/out is a file"),
    ):
        with pytest.raises(ConfigError, match=f"^--cache_dir {path}: {message}"):
            output.resolve_folder(str(path), in_job=False, flag="--cache_dir")
    with pytest.raises(ConfigError, match="is a file, not a folder"):
        output.claim(str(tmp_path / "out"), overwrite=True)
    assert (tmp_path / "out").read_text() == "mine"


def test_an_export_replaces_what_an_export_wrote_and_nothing_else(tmp_path: Path) -> None:
    for name in ("export.yaml", "config.json", "model-00001-of-00002.safetensors", "tokenizer.json"):
        (tmp_path / name).write_text("")
    output.check_free(str(tmp_path), overwrite=True, kind=output.EXPORT)
    (tmp_path / "thesis.docx").write_text("")
    with pytest.raises(ConfigError, match=r"holds thesis\.docx, which no run of vlmtune wrote"):
        output.claim(str(tmp_path), overwrite=True, kind=output.EXPORT)
    assert (tmp_path / "config.json").exists()
