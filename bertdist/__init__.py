"""bertdist: fine-tune, evaluate and use BERT-family text classifiers, with the same arithmetic everywhere."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bertdist.predict import Predictor as Predictor

__version__ = "0.1.0"
__all__ = ["Predictor", "__version__"]


def __getattr__(name: str) -> Any:
    """`from bertdist import Predictor` without making every `import bertdist` pay for torch."""
    if name == "Predictor":
        from bertdist.predict import Predictor

        return Predictor
    raise AttributeError(f"module 'bertdist' has no attribute {name!r}")
