"""Refit: train the best trial's values once more, alone, on the evaluation rows too."""

import logging

from vlmtune.cluster import Cluster
from vlmtune.config.settings import Settings
from vlmtune.console import console_line
from vlmtune.data.split import EVAL, TRAIN
from vlmtune.data.store import Store
from vlmtune.single_run import train_with_runner

logger = logging.getLogger(__name__)


def refit(settings: Settings, store: Store, folder: str, cluster: Cluster) -> tuple[str, Store]:
    """Train the best trial's settings on all rows but the test rows.

    Its metrics on evaluation rows mean nothing, because it trains on these rows. So its last checkpoint is
    used, and the adapter keeps the metrics that the search measured.

    Args:
        store: the prepared rows of the search.
        folder: output folder of the search.

    Returns:
        The last checkpoint (folder or URI), and the store with the rows that were trained on.
    """
    with_eval = Store(store.folder, train_splits=(TRAIN, EVAL), model=store.model)
    text = f"the best values once more, on {len(with_eval.rows_of(TRAIN))} rows: train and eval"
    logger.info(console_line("Refit", text))
    to_its_end = settings.replace(load_best_model_at_end=False, early_stopping_patience=None)
    outcome = train_with_runner(to_its_end, with_eval, f"{folder}/tune/refit", cluster, lambda _: None)
    return outcome.checkpoint, with_eval
