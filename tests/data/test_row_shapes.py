"""Which fields of a row are a question and its answer."""

from vlmtune.data.row_shapes import as_known_shape, question_fields


def test_question_fields() -> None:
    assert question_fields({"answer", "question", "image"}) == ("question", "answer")
    assert question_fields(["prompt", "response"]) == ("prompt", "response")
    assert question_fields({"question"}) is None
    assert question_fields({"messages", "question", "answer"}) is None  # a dialogue goes first


def test_a_known_shape_stays_as_it_is() -> None:
    for record in (3, {"instruction": "a", "output": "b"}, {"prompt": [{"role": "user"}], "completion": []}):
        assert as_known_shape(record) == (record, {})
    assert as_known_shape({"query": "a", "response": "b", "history": [["c", "d"]]}) == (
        {"instruction": "a", "output": "b", "history": [["c", "d"]]},
        {"instruction": "query", "output": "response"},
    )
