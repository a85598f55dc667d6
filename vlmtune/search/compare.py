"""What searching was worth, on rows that no trial saw: answers of the base, of the config's own values, and
of the best adapter."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from ray.exceptions import RayError

from vlmtune.cluster import Cluster
from vlmtune.config.settings import Settings
from vlmtune.console import labelled
from vlmtune.data.split import TEST
from vlmtune.data.store import Store
from vlmtune.errors import UserError
from vlmtune.evaluation.actors import BASE, Job
from vlmtune.evaluation.adapter import WEIGHTS
from vlmtune.evaluation.evaluate import answered
from vlmtune.evaluation.generate import Layout
from vlmtune.evaluation.metrics import METRICS, Estimate, Row, estimates
from vlmtune.evaluation.numbers import number
from vlmtune.evaluation.options import NEW_TOKENS
from vlmtune.search.results import reason
from vlmtune.storage import exists, filesystem

logger = logging.getLogger(__name__)

MOST_ROWS = 500  # an interval of a share is then at most 9 points wide; more rows cost more than they tell
BEST, OWN = "best", "own"
NO_TEST_ROWS = "the data has no test rows that a comparison with the base could use (--test_fraction)"


@dataclass(frozen=True)
class Answered:
    """One test row of the store, and what each model says to it, by BEST, OWN and BASE."""

    row: int
    question: str
    reference: str
    answers: dict[str, str]


@dataclass(frozen=True)
class Comparison:
    """The models on the same rows. `total`: how many test rows there are; `over`: the best adapter's metrics
    minus those of the others."""

    rows: list[Answered]
    total: int
    metrics: list[str]
    models: dict[str, dict[str, Estimate]]
    over: dict[str, dict[str, Estimate]]

    def facts(self) -> dict[str, Any]:
        """The numbers as metrics.json holds them."""

        def plain(of: Mapping[str, Mapping[str, Estimate]]) -> dict[str, Any]:
            return {
                model: {name: asdict(estimate) for name, estimate in found.items()}
                for model, found in of.items()
            }

        return {
            "rows": len(self.rows),
            "of": self.total,
            "models": plain(self.models),
            "best_minus": plain(self.over),
        }

    def card(self) -> dict[str, str]:
        """The same, in lines of a model card's table."""
        base = self.models[BASE]
        return {
            f"{name.replace('_', ' ')}, {len(self.rows)} test rows": f"{shown(name, found.value)} (base: {shown(name, base[name].value)})"
            for name, found in self.models[BEST].items()
        }

    def line(self) -> str:
        """Before and after in a line."""
        which = f"{len(self.rows)} of the {self.total}" if len(self.rows) < self.total else f"{self.total}"
        said = [f"{which} rows that no trial saw: {self._change(self.metrics[0], own=True)}"]
        if second := next((name for name in self.metrics[1:] if name in self.models[BEST]), None):
            said.append(self._change(second, own=False))
        return "; ".join(said)

    def _change(self, name: str, *, own: bool) -> str:
        before, after = (shown(name, self.models[model][name].value) for model in (BASE, BEST))
        also = (
            f" (the config's own values: {shown(name, self.models[OWN][name].value)})"
            if own and OWN in self.models
            else ""
        )
        if name == "mae":
            return f"off by {before} → {after} on average{also}"
        return f"{name.replace('_', ' ')} {before} → {after}{also}"


def shown(name: str, value: float) -> str:
    """A metric's value: a share in per cent, other numbers with two digits."""
    return f"{100 * value:.1f} %" if METRICS[name].share else f"{value:.2g}"


def compare(
    settings: Settings, store: Store, cluster: Cluster, best: str, own: str | None
) -> Comparison | str:
    """Let the base, the best adapter and that of the config's own values answer test rows; or why that
    cannot be.

    A search has its result by now: whatever keeps a model from answering is said, and does not end it.

    Args:
        settings: those of the best trial.
        best: folder or URI of the best adapter.
        own: that of the config's own values, where it is another and its trial ran to its end.
    """
    test = store.rows_of(TEST)
    if not len(test):
        return NO_TEST_ROWS
    rows = chosen(test, settings.training.seed)
    answered = f"{len(rows)} of {len(test)} rows that no trial saw are answered"
    logger.info(labelled("Test", f"{answered}, by the base and by the adapters"))
    try:
        found = _answers(settings, store, cluster, rows, best, own)
    except (UserError, RayError) as error:
        return f"the test rows could not be answered: {reason(str(error))}"
    return comparison(
        found, [str(group) for group in store.column("group")[rows]], len(test), settings.training.seed
    )


def chosen(test: np.ndarray, seed: int) -> np.ndarray:
    """At most MOST_ROWS of the test rows, in their order: the same ones of the same rows and seed."""
    if len(test) <= MOST_ROWS:
        return test
    return np.sort(np.random.default_rng(seed).choice(test, MOST_ROWS, replace=False))


def _answers(
    settings: Settings, store: Store, cluster: Cluster, rows: np.ndarray, best: str, own: str | None
) -> list[Answered]:
    adapters = {BEST: adapter_files(best)} | ({OWN: adapter_files(own)} if own is not None else {})
    job = Job(settings.to_flags(), adapters, (*adapters, BASE), Layout.of(store), NEW_TOKENS, likely=False)
    return [
        Answered(
            int(row),
            result["question"],
            result["reference"],
            {model: result[model]["answer"] for model in job.models},
        )
        for row, result in zip(rows, answered(job, store, rows, cluster), strict=True)
    ]


def adapter_files(folder: str) -> dict[str, bytes]:
    """What PEFT needs of an adapter, from a folder or URI."""
    fs, inner = filesystem(folder)
    files = {}
    for name in WEIGHTS:
        if exists(f"{folder}/{name}"):
            with fs.open_input_stream(f"{inner}/{name}") as stream:
                files[name] = bytes(stream.read())
    return files


def comparison(rows: Sequence[Answered], groups: Sequence[str], total: int, seed: int) -> Comparison:
    """What the answers are worth: errors of numbers where the references tell numbers, shared words where
    they do not."""
    numbers = 2 * sum(number(row.reference) is not None for row in rows) >= len(rows)
    metrics = ["exact_match", "mae", "within_1"] if numbers else ["exact_match", "token_f1"]
    by_model = {
        model: [Row(row.answers[model], row.reference) for row in rows]
        for model in (BEST, OWN, BASE)
        if model in rows[0].answers
    }
    models, over = {}, {}
    for other in (OWN, BASE):  # in pairs, because a difference of two is what `estimates` resamples together
        if other in by_model:
            models[BEST], models[other], over[other] = estimates(
                [by_model[BEST], by_model[other]], groups, metrics, seed=seed
            )
    return Comparison(list(rows), total, metrics, models, over)


def worst_first(rows: Sequence[Answered], metrics: Sequence[str], seed: int) -> list[Answered]:
    """The rows by how wrong the best adapter's answer is; equals in an order that the seed draws, for
    neighbours are much alike."""

    def wrong(row: Answered) -> tuple[float, float]:
        answer = Row(row.answers[BEST], row.reference)
        score = METRICS["mae" if "mae" in metrics else "token_f1"]
        loss = score.parts(answer)[0] * (1 if score.mode == "min" else -1)
        return (METRICS["exact_match"].parts(answer)[0], -loss)

    drawn = np.random.default_rng(seed).permutation(len(rows))
    return sorted((rows[place] for place in drawn), key=wrong)
