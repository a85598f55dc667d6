"""A row of a mixed batch computes as it does alone, whether it has a picture or not."""

from pathlib import Path

import torch
from PIL import Image

from vlmtune.data.collate import collate
from vlmtune.data.processor import load_processor
from vlmtune.data.tokenize import RowEncoder
from vlmtune.model.base import load_base


def test_rows_with_and_without_pictures_do_not_see_each_other(models: Path, mall: Path):
    encoder = RowEncoder(load_processor(str(models / "mllama")))
    model = load_base(str(models / "mllama"), quantization="none", dtype="float32", device=torch.device("cpu"))
    ask, picture = [{"type": "text", "text": "How many people?"}], [{"type": "image"}]
    answer = {"role": "assistant", "content": [{"type": "text", "text": "5"}]}
    with Image.open(mall / "frames" / "seq_000001.jpg") as image:
        rows = [encoder.encode([{"role": "user", "content": picture + ask}, answer], [image.convert("RGB")])]
    rows.append(encoder.encode([{"role": "user", "content": ask}, answer], []))

    def logits(*examples) -> torch.Tensor:
        batch = collate(examples, pad_token_id=0, per_row=True)
        with torch.no_grad():
            return model(**{name: torch.from_numpy(value) for name, value in batch.items() if name != "labels"}).logits

    together = logits(*rows)
    for index, row in enumerate(rows):
        torch.testing.assert_close(together[index, : len(row.input_ids)], logits(row)[0], rtol=1e-4, atol=1e-4)
