"""A row of a mixed batch computes as it does alone, however many images it and the others have."""

from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image

from vlmtune.data.collate import collate
from vlmtune.data.find_input_format import find_input_format
from vlmtune.data.tokenize import RowEncoder
from vlmtune.model.base import load_base
from vlmtune.model_ref import ModelRef


def test_rows_with_and_without_images_do_not_see_each_other(models: Path, mall: Path):
    processor = ModelRef(str(models / "mllama")).processor()
    input_format = replace(find_input_format(processor), normalizations={})
    encoder = RowEncoder(processor, input_format)
    model = load_base(
        ModelRef(str(models / "mllama")), quantization="none", dtype="float32", device=torch.device("cpu")
    )
    ask, image_part = [{"type": "text", "text": "How many people?"}], [{"type": "image"}]
    answer = {"role": "assistant", "content": [{"type": "text", "text": "5"}]}
    with Image.open(mall / "frames" / "seq_000001.jpg") as image:
        shown = image.convert("RGB")
    rows = [
        encoder.encode([{"role": "user", "content": image_part * count + ask}, answer], [shown] * count)
        for count in (1, 0, 2)
    ]

    def logits(*examples) -> torch.Tensor:
        batch = collate(examples, pad_token_id=0, input_format=input_format)
        with torch.no_grad():
            return model(
                **{name: torch.from_numpy(value) for name, value in batch.items() if name != "labels"}
            ).logits

    for mix in (rows, rows[:2], rows[::2]):
        together = logits(*mix)
        for index, row in enumerate(mix):
            torch.testing.assert_close(
                together[index, : len(row.input_ids)], logits(row)[0], rtol=1e-4, atol=1e-4
            )
