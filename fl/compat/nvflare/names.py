"""Names that recipes and scripts share."""

from typing import Final

NUMPY_KEY: Final = "numpy_key"
"""The one array of a NumPy model."""
