"""Find and train the best LoRA adapter of a vision-language model for your own images and texts.

    import vlmtune

    settings = vlmtune.Settings.load("configs/demo.yaml").replace(num_samples=8)
    result = vlmtune.search(settings)
    model, processor = result.best.load()

`import vlmtune` imports neither ray nor torch nor transformers. The functions import them when they are
called.
"""

__version__ = "0.1.0"

from vlmtune.api import evaluate, export, inspect, predict, search, train
from vlmtune.config.settings import Settings

__all__ = ["Settings", "evaluate", "export", "inspect", "predict", "search", "train"]
