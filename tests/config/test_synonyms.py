"""Names of other tools get the right name of vlmtune, not the nearest spelling."""

import pytest

from vlmtune.config.flag_table import ALIASES, find_flag, flags
from vlmtune.config.limits import UNSUPPORTED
from vlmtune.config.synonyms import SYNONYMS, SYNONYMS_OF_ANSWERING
from vlmtune.errors import ConfigError


@pytest.mark.parametrize(
    ("typed", "right"),
    [
        ("lr", "--learning_rate"),
        ("epochs", "--num_train_epochs"),
        ("batch_size", "--per_device_train_batch_size"),
        ("model", "--model_name_or_path"),
        ("dataset_name", "--data_path"),
        ("cutoff_len", "--max_length"),
        ("n_trials", "--num_samples"),
        ("warmup_ratio", "--warmup_steps"),
        ("image_size", "the model's processor"),
        ("group_by_length", "train_sampling_strategy group_by_length"),
    ],
)
def test_the_right_name_is_told(typed: str, right: str) -> None:
    with pytest.raises(ConfigError, match=right):
        find_flag(typed, f"--{typed}")


def test_every_synonym_leads_to_an_option_and_hides_none() -> None:
    known = flags().keys() - UNSUPPORTED.keys()
    assert set(SYNONYMS.values()) <= known
    assert not set(SYNONYMS) & {*flags(), *ALIASES}
    assert set(SYNONYMS_OF_ANSWERING.values()) <= known | {"adapter", "question", "max_new_tokens", "format"}
