"""Made-up trials, for tests of what is told about a search."""

from typing import Any

from vlmtune.search.trial_results import COMPLETE, FAILED, INFEASIBLE, TrialResult


def trial(number: int, rate: float, state: str = COMPLETE, **metrics: Any) -> TrialResult:
    """A trial that is the better, the nearer its rate is to 1e-3."""
    step = 8 if state == COMPLETE else 2
    known = {"eval_loss": abs(rate - 1e-3) * 100 + 0.1, "step": step, "max_steps": 8, "seconds": 5.0 * step}
    if state in (FAILED, INFEASIBLE):
        known = {}
    values = {
        "learning_rate": rate,
        "lora_r": 4 * (1 + number % 2),
        "lora_target_modules": ["q_proj"] if number % 3 else "all-linear",
    }
    return TrialResult(f"t{number}", values, state, {**known, **metrics})
