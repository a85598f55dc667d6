import errno

import pytest

from vlmtune.faults import disk_reason, output_fault


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "no space is left on the disk"),
        (OSError(errno.EROFS, "Read-only file system", "/out/x"), "the file system is read-only"),
        (PermissionError(errno.EACCES, "Permission denied"), "it may not be written to (permission denied)"),
        ("ray::f()\nOSError: [Errno 28] Error writing bytes to file", "no space is left on the disk"),
        ("RuntimeError: [enforce fail] ... No space left on device", "no space is left on the disk"),
        ("FileNotFoundError: [Errno 2] No such file or directory: '/out/tune'", "it is gone"),
        ("ValueError: 28 rows", None),
        (ValueError("[Errno 28]"), None),
        (OSError("no number"), None),
    ],
)
def test_why_a_file_could_not_be_written(error: BaseException | str, reason: str | None) -> None:
    assert disk_reason(error) == reason


def test_the_line_names_the_folder_and_the_way_out() -> None:
    line = output_fault("/out", "no space is left on the disk")
    assert line.startswith("--output_dir /out: no space is left on the disk; ")
    assert line.endswith("python ray_jobs/tune.py --resume /out")
