"""The wire both daemons share; owned by neither, imports neither."""

from typing import Final

__version__: Final = "0.1.0"
