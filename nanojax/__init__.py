"""NanoJAX: train GPTs in JAX, from text to a model that serves."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nanojax.cli import load_preset
    from nanojax.config import Config
    from nanojax.infer.engine import Engine
    from nanojax.model import GPT

__version__ = "0.1.0"

# Public names, imported when first used, so that `nanojax --help` never imports jax.
_PUBLIC = {"Config": "nanojax.config", "load_preset": "nanojax.cli", "GPT": "nanojax.model", "Engine": "nanojax.infer.engine"}
__all__ = ["GPT", "Config", "Engine", "__version__", "load_preset"]  # lazily, by __getattr__


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'nanojax' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)
