"""Answer a question about every image of a folder, or the rows of a data file.

python ray_jobs/predict.py --adapter out/demo/best --data_path FOLDER --question "How many?" --output_dir DIR
"""

from vlmtune.cli.commands import predict

if __name__ == "__main__":
    predict()
