"""Export an adapter: merged into its base, or as one file; and how vLLM serves it.

python ray_jobs/export.py --adapter out/demo/best --merge --output_dir out/demo/merged
"""

from vlmtune.cli.commands import export

if __name__ == "__main__":
    export()
