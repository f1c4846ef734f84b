"""NitroFusion Engine: one-step text-to-image by dynamic adversarial training (arXiv 2412.02030).

    >>> import nitrofusion
    >>> image = nitrofusion.load("world").generate("a red circle on a navy background")[0]
"""

__version__ = "0.1.0"
__all__ = ["TimestepShiftLCMScheduler", "accelerate", "evaluate", "load", "restore"]


def __getattr__(name: str):
    """Public names load on first use, so that ``import nitrofusion`` is instant."""
    if name == "load":
        from .engine import load

        return load
    if name in ("accelerate", "restore"):
        from .engine import accelerate as module

        return getattr(module, name)
    if name == "evaluate":
        from .evaluate import evaluate

        return evaluate
    if name == "TimestepShiftLCMScheduler":
        from .scheduler import TimestepShiftLCMScheduler

        return TimestepShiftLCMScheduler
    raise AttributeError(f"module 'nitrofusion' has no attribute {name!r}")
