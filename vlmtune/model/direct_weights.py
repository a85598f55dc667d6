"""Find linear layers that must not be quantized, because the model's code uses their weights directly.

If such a layer is quantized, `pixel_values.to(self.patch_embedding.weight.dtype)` makes bytes of the pixels,
and `self.coefs.weight.clamp_(...)` changes packed bits. Such code is found in the source of the model's
classes.
"""

from __future__ import annotations

import inspect
import re
from functools import cache
from typing import Any

from torch import nn

SELF_WEIGHT = re.compile(r"\bself\.((?:\w+\.)*\w+)\.weight\b")


def directly_read_layers(model: nn.Module) -> list[str]:
    """Names of the linear layers in `model` whose `weight` is used in the code of other modules.

    Classes without source code are skipped.
    """
    names = []
    for name, module in model.named_modules():
        for path in sorted(_weights_in_source(type(module))):  # type: ignore[arg-type]
            try:
                layer = module.get_submodule(path)
            except AttributeError:
                continue
            if isinstance(layer, nn.Linear):
                names.append(f"{name}.{path}" if name else path)
    return list(dict.fromkeys(names))


@cache
def _weights_in_source(kind: Any) -> frozenset[str]:
    """The PATHs of all `self.PATH.weight` in the code of a class and its bases, except torch's."""
    paths: set[str] = set()
    for base in kind.__mro__:
        if base.__module__.partition(".")[0] in ("torch", "builtins"):
            continue
        try:
            paths.update(SELF_WEIGHT.findall(inspect.getsource(base)))
        except (OSError, TypeError):  # no source file, or a class of an extension
            continue
    return frozenset(paths)
