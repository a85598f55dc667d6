"""The winner of a search trained once more, alone, on the evaluation rows too."""

import logging

from vlmtune.cluster import Cluster
from vlmtune.config.settings import Settings
from vlmtune.console import labelled
from vlmtune.data.split import EVAL, TRAIN
from vlmtune.data.store import Store
from vlmtune.packed.train_packed import run_packed
from vlmtune.training.run import run_isolated

logger = logging.getLogger(__name__)


def refit(chosen: Settings, store: Store, folder: str, cluster: Cluster) -> tuple[str, Store]:
    """Train the chosen settings on all rows but the test split's; returns the checkpoint and the rows' store.

    What this run measures on evaluation rows says nothing: it has been trained on them. The search's numbers
    stay the adapter's.
    """
    whole = Store(store.folder, train_splits=(TRAIN, EVAL))
    rows = len(whole.rows_of(TRAIN))
    logger.info(labelled("Refit", f"the best values once more, on {rows} rows: train and eval"))
    run = run_packed if chosen.search.trial_runner == "packed" else run_isolated
    outcome = run(chosen, whole, f"{folder}/tune/refit", cluster, lambda _: None)
    return outcome.checkpoint, whole
