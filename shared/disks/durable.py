"""Making what was written outlast a power cut."""

import os
from pathlib import Path


def sync(path: Path) -> None:
    """Make a file, or the names in a directory, last."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
