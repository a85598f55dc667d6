"""What a person asks of a running search."""

from pathlib import Path

from vlmtune.search.requests import UserRequests


def test_values_are_taken_once_in_their_order(tmp_path: Path) -> None:
    page, search = UserRequests(str(tmp_path)), UserRequests(str(tmp_path))
    assert search.take() is None and search.waiting() == []
    for rate in (1e-3, 2e-3):
        page.propose({"learning_rate": rate})
    assert search.waiting() == [{"learning_rate": 1e-3}, {"learning_rate": 2e-3}]
    assert [search.take(), search.take(), search.take()] == [
        {"learning_rate": 1e-3},
        {"learning_rate": 2e-3},
        None,
    ]


def test_one_trial_is_stopped_and_no_other(tmp_path: Path) -> None:
    page, search = UserRequests(str(tmp_path)), UserRequests(str(tmp_path))
    page.stop("a")
    assert search.is_stopped("a") and not search.is_stopped("b")


def test_object_storage_has_no_requests() -> None:
    remote = UserRequests("s3://bucket/out")
    remote.stop("a")
    remote.propose({})
    assert not remote.is_stopped("a") and remote.take() is None
