"""How good is the time that is left, as a command prints it?

    python benchmarks/eta.py vlmtune train --config configs/demo.yaml --output_dir out/eta

Runs the command, and prints the remaining time of each line, what it was in the end, and their ratio.
Last, how many of the lines after the first tenth of the work are within a factor of 1.5. The work is the
training: of a search, the trials and the runs that confirm the best ones. It ends with the first line that
begins with one of `AFTER`, or with the command.
"""

import re
import subprocess
import sys
import time
from collections.abc import Sequence

LEFT = re.compile(r"about ((?:\d+ (?:h|min|minutes|s) )+)left")
SECONDS = {"s": 1, "minutes": 60, "min": 60, "h": 3600}
FACTOR = 1.5
AFTER = ("Test ", "Best ", "Trained ", "Adapter ")


def seconds_left(line: str) -> float | None:
    """The seconds that a line says are left, if it does."""
    match = LEFT.search(line)
    if match is None:
        return None
    return float(sum(int(number) * SECONDS[unit] for number, unit in re.findall(r"(\d+) (\w+)", match[1])))


def ratios(times: Sequence[float], estimates: Sequence[float], end: float) -> list[float]:
    """The estimate over the truth for lines that were printed at `times`; 1 is right."""
    return [left / max(end - at, 1e-9) for at, left in zip(times, estimates, strict=True)]


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print(__doc__)
        sys.exit(0 if len(sys.argv) > 1 else 2)
    process = subprocess.Popen(sys.argv[1:], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    times: list[float] = []
    estimates: list[float] = []
    end: float | None = None
    for line in process.stdout:
        print(line, end="", flush=True)
        left = seconds_left(line)
        if times and end is None and line.startswith(AFTER):
            end = time.monotonic()
        if left is not None and end is None:
            times.append(time.monotonic())
            estimates.append(left)
    code = process.wait()
    if code or len(estimates) < 2:
        print(f"the command ended with {code}, and {len(estimates)} of its lines had a time")
        sys.exit(1)
    begin, end = times[0], end or time.monotonic()
    found = ratios(times, estimates, end)
    for at, left, ratio in zip(times, estimates, found, strict=True):
        print(f"after {at - begin:6.0f} s: printed {left:6.0f} s, was {end - at:6.0f} s, ratio {ratio:.2f}")
    late = [ratio for at, ratio in zip(times, found, strict=True) if at - begin > (end - begin) / 10]
    good = sum(1 / FACTOR <= ratio <= FACTOR for ratio in late)
    print(f"within a factor of {FACTOR} after the first tenth: {good} of {len(late)} lines")


if __name__ == "__main__":
    main()
