"""Look at the data before training: what is in it, what is wrong with it, how long rows are.

python ray_jobs/inspect_data.py --config configs/demo.yaml [--output_dir DIR]
"""

from vlmtune.cli.commands import inspect

if __name__ == "__main__":
    inspect()
