"""Evaluate an adapter: answer held-out rows, and compute metrics of the answers.

python ray_jobs/eval.py --adapter out/demo/best --output_dir out/demo/eval [--compare_base | --base_only]
"""

from vlmtune.cli.commands import evaluate

if __name__ == "__main__":
    evaluate()
