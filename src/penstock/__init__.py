"""penstock: an LLM inference engine and serving system.

Importing the package costs nothing: `LLM` and `SamplingParams` are loaded on first use, so that `penstock --help`
stays under 0.3 s.
"""

__version__ = "0.1.0"

_LAZY = {"LLM": "penstock.llm", "SamplingParams": "penstock.core.request"}


def __getattr__(name: str):
    if name in _LAZY:
        import importlib

        if name == "LLM":
            importlib.import_module("penstock.config.openmp").bound_spinning()  # before torch is loaded
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'penstock' has no attribute {name!r}")


__all__ = ["LLM", "SamplingParams", "__version__"]
