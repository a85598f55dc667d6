"""What a search of many trials over many engines costs its driver: engines that sleep instead of training.

    python benchmarks/scale.py --trials 1000 --engines 64 --slots 8
    python benchmarks/scale.py --trials 10000 --engines 256 --slots 8
    python benchmarks/scale.py driver --trials 1000

The driver, Ray Tune, Optuna, ASHA, the files of the trials and the protocol between trials and engines are
those of every packed search; only an engine's rounds are sleep. It prints a line of the table in
docs/benchmarks.md:

- lost: the share of the slots' time, from the first join to the last trial's end, in which a slot waited for
  the search: empty, or paused because its reports were not read. Starting up is told apart.
- delay: from an engine's report to the trial's next call, which is the search's decision.
- CPU seconds of this process and of Ray's own (GCS, raylet), per trial; memory of this process at the end.

`driver` makes the driver's own calls for so many trials without Ray: CPU milliseconds a trial so far, in each
of its parts. What grows with the number of trials shows there.

Each trial that runs is a process, as in a real search: 512 of them need some 100 GB and a machine of many
cores.
"""

import argparse
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Condition, Thread
from typing import Any

import psutil
import ray
from ray import tune

from vlmtune.cluster import connect
from vlmtune.compat.ray_node import control_processes
from vlmtune.config.settings import Settings
from vlmtune.packed.engine_pool import MAX_CONCURRENT_CALLS
from vlmtune.packed.messages import TRIAL_ID, Availability, TrialReport, TrialRequest, UnknownTrialError
from vlmtune.packed.packed_trial import PackedTrial
from vlmtune.packed.trial_registry import MAX_UNREAD_REPORTS
from vlmtune.search.live_state import LiveState
from vlmtune.search.saved_trials import End, to_text
from vlmtune.search.search_progress import SearchProgress
from vlmtune.search.space import Space
from vlmtune.search.trial_console import TrialConsole
from vlmtune.search.trial_queue import TrialQueue
from vlmtune.search.trial_runners import PACKED_FAILURES, TrialRunner
from vlmtune.search.tuner import make_searcher, run_trials
from vlmtune.training.meter import EVALUATION_NUMBER

SPACE = {"learning_rate": {"loguniform": [1e-5, 1e-2]}, "lora_r": {"choice": [4, 8, 16]}}
EVALUATIONS = 4  # of a trial
ENGINE_CPUS = 0.001  # asked of Ray: sleeping takes none


@dataclass
class SleepingTrial:
    """One trial of a sleeping engine."""

    request: TrialRequest
    reports: list[TrialReport] = field(default_factory=list)
    reported_at: list[float] = field(default_factory=list)
    next_report: int = 0
    left: bool = False

    @property
    def unread(self) -> int:
        return len(self.reports) - self.next_report


class SleepingEngine:
    """What trials call of `EngineActor`, with a sleep for the steps between two evaluations.

    Args:
        slots: how many trials train at once.
        evaluations: of a trial.
        seconds: between two of them.
    """

    def __init__(self, slots: int, evaluations: int, seconds: float) -> None:
        self.slots, self.evaluations, self.seconds = slots, evaluations, seconds
        self.trials: dict[str, SleepingTrial] = {}
        self.changed = Condition()
        self.delays: list[float] = []
        self.trained_s = 0.0  # slept in slots
        self.first_join: float | None = None
        self.last_end = 0.0

    def check_availability(self, trial_id: str, wait_s: float = 0.0) -> Availability:
        with self.changed:
            self.changed.wait_for(lambda: trial_id in self.trials or self._free > 0, timeout=wait_s)
            return Availability(trial_id in self.trials, self._free)

    def join(self, request: TrialRequest) -> bool:
        with self.changed:
            if request.trial_id in self.trials:
                return True
            if self._free == 0:
                return False
            self.first_join = self.first_join or time.monotonic()
            trial = self.trials[request.trial_id] = SleepingTrial(request)
        Thread(target=self._train, args=(trial,), daemon=True).start()
        return True

    def wait_for_report(self, trial_id: str, number: int, wait_s: float) -> TrialReport | None:
        with self.changed:
            trial = self.trials.get(trial_id)
            if trial is None:
                raise UnknownTrialError(trial_id)
            if number > trial.next_report:  # the search has decided on the report before
                self.delays.append(time.monotonic() - trial.reported_at[number - 1])
            trial.next_report = number
            self.changed.notify_all()
            self.changed.wait_for(lambda: len(trial.reports) > number, timeout=wait_s)
            return trial.reports[number] if len(trial.reports) > number else None

    def leave(self, trial_id: str) -> None:
        with self.changed:
            trial = self.trials.pop(trial_id, None)
            if trial is not None:
                trial.left = True
                if trial.unread:
                    self.delays.append(time.monotonic() - trial.reported_at[-1])
            self.changed.notify_all()

    def figures(self) -> dict[str, Any]:
        """What it measured; times in this machine's monotonic seconds."""
        return {
            "delays": self.delays,
            "trained_s": self.trained_s,
            "first_join": self.first_join,
            "last_end": self.last_end,
        }

    @property
    def _free(self) -> int:
        return self.slots - sum(len(trial.reports) < self.evaluations for trial in self.trials.values())

    def _train(self, trial: SleepingTrial) -> None:
        rate = trial.request.settings.training.learning_rate
        for number in range(1, self.evaluations + 1):
            time.sleep(self.seconds)
            with self.changed:
                self.trained_s += self.seconds
                self.changed.wait_for(lambda: trial.left or trial.unread < MAX_UNREAD_REPORTS)
                if trial.left:
                    return
                metrics = {
                    "eval_loss": abs(rate - 3e-4) * 100 + 1 / number,
                    EVALUATION_NUMBER: number,
                    "step": number,
                    "max_steps": self.evaluations,
                    "epoch": number / self.evaluations,
                    "seconds": number * self.seconds,
                }
                trial.reports.append(TrialReport(metrics, final=number == self.evaluations))
                trial.reported_at.append(time.monotonic())
                self.last_end = time.monotonic()
                self.changed.notify_all()


def measure(trials: int, engines: int, slots: int, evaluations: int, seconds: float) -> dict[str, float]:
    """Run a search whose engines sleep; returns the columns of the table."""
    connect()
    settings = Settings.from_flags(
        {"num_samples": trials, "search_space": SPACE, "recipe": None, "grace_period": 0.25}
    )
    space = Space.parse(SPACE, settings)
    remote: Any = ray.remote(SleepingEngine)
    options = {"num_cpus": ENGINE_CPUS, "max_concurrency": MAX_CONCURRENT_CALLS}
    handles = [remote.options(**options).remote(slots, evaluations, seconds) for _ in range(engines)]
    with tempfile.TemporaryDirectory() as folder:
        trainable = tune.with_parameters(PackedTrial, settings=settings, engines=handles, output_dir=folder)
        runner = TrialRunner(
            "packed",
            trainable,
            min(trials, engines * slots),
            "",
            reuse_actors=True,
            max_failures=PACKED_FAILURES,
            engines=tuple(handles),
        )
        console = TrialConsole(
            space.names, "eval_loss", "min", SearchProgress(trials, at_once=len(handles)), "CPU"
        )
        own, rays = psutil.Process(), [psutil.Process(pid) for pid in control_processes().values()]
        before, before_rays, started = cpu_seconds(own), sum(map(cpu_seconds, rays)), time.monotonic()
        ended = run_trials(settings, space, folder, console, runner)
        wall = time.monotonic() - started
        figures = ray.get([handle.figures.remote() for handle in handles])
        files = len(list(Path(folder, "tune", "trials").iterdir()))
    assert len(ended) == files == trials and all(one.end in (End.LAST_REPORT, End.STOPPED) for one in ended)
    delays = [delay for one in figures for delay in one["delays"]]
    first = min(one["first_join"] for one in figures if one["first_join"] is not None)
    span = max(one["last_end"] for one in figures) - first
    trained = sum(one["trained_s"] for one in figures)
    return {
        "seconds": wall,
        "start-up s": first - started,
        "lost %": 100 * (1 - trained / (span * min(trials, engines * slots))),
        "delay ms": 1e3 * statistics.median(delays),
        "delay 95 % ms": 1e3 * statistics.quantiles(delays, n=20)[-1],
        "driver CPU ms a trial": 1e3 * (cpu_seconds(own) - before) / trials,
        "Ray CPU ms a trial": 1e3 * (sum(map(cpu_seconds, rays)) - before_rays) / trials,
        "driver GB": own.memory_info().rss / 2**30,
    }


def driver_cpu(trials: int) -> None:
    """Print what the driver's parts take for each trial, after 1/10, 3/10 and all of the trials."""
    settings = Settings.from_flags({"num_samples": trials, "search_space": SPACE, "recipe": None})
    space = Space.parse(SPACE, settings)
    seconds: dict[str, float] = defaultdict(float)
    print("| trials | propose | report | end | live page | trial's file |\n" + "|---" * 6 + "|")
    with tempfile.TemporaryDirectory() as folder:
        queue = TrialQueue(make_searcher(settings, space, folder), [], trials)
        live = LiveState(folder, {"eval_loss": "min"}, trials)
        for done in range(1, trials + 1):
            name = str(done)
            with timed(seconds, "propose"):
                config = queue.suggest(name)
            assert config is not None
            trial = queue.trials[config[TRIAL_ID]]
            for number in range(1, EVALUATIONS + 1):
                loss = abs(trial.values["learning_rate"] - 3e-4) * 100 + 1 / number
                report = {
                    "eval_loss": loss,
                    "step": number,
                    "max_steps": EVALUATIONS,
                    EVALUATION_NUMBER: number,
                }
                trial.add_report(report)
                with timed(seconds, "trial's file"):
                    to_text(trial, folder)
                if number < EVALUATIONS:
                    with timed(seconds, "report"):
                        queue.on_trial_result(name, report)
            with timed(seconds, "end"):
                queue.on_trial_complete(name, report)
            trial.end = End.LAST_REPORT
            with timed(seconds, "live page"):
                live.write(queue.trials.values(), at_once=True)
            if done in (trials // 10, 3 * trials // 10, trials):
                parts = ("propose", "report", "end", "live page", "trial's file")
                print(
                    f"| {done} | " + " | ".join(f"{1e3 * seconds[part] / done:.1f}" for part in parts) + " |"
                )


@contextmanager
def timed(seconds: dict[str, float], part: str) -> Iterator[None]:
    """Add the CPU seconds of the block to those of `part`."""
    started = time.process_time()
    yield
    seconds[part] += time.process_time() - started


def cpu_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("what", nargs="?", choices=["search", "driver"], default="search")
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--engines", type=int, default=64)
    parser.add_argument("--slots", type=int, default=8, help="of each engine")
    parser.add_argument("--evaluations", type=int, default=EVALUATIONS, help="of a trial")
    parser.add_argument("--seconds", type=float, default=15.0, help="between two evaluations")
    options = parser.parse_args()
    if options.what == "driver":
        driver_cpu(options.trials)
        return
    found = measure(options.trials, options.engines, options.slots, options.evaluations, options.seconds)
    names = ["trials", "engines", "slots", *found]
    values = [options.trials, options.engines, options.slots, *(f"{value:.4g}" for value in found.values())]
    print("| " + " | ".join(names) + " |\n|" + "---|" * len(names))
    print("| " + " | ".join(map(str, values)) + " |")


if __name__ == "__main__":
    main()
