"""Triptych's client: the SDK (`Client`) and, in `triptych.cli`, the command line.

Speaks HTTP to the API and nothing else; holds no server code.
"""

from triptych.client import Client
from triptych.problem import NotConfigured, OperationFailed, Problem, Unreachable
from triptych.types import (
    Clone,
    Event,
    Farm,
    Image,
    Operation,
    Page,
    Run,
    Runs,
    Schedule,
    Server,
    Snapshot,
)

__version__ = "0.1.0"

__all__ = [
    "Client",
    "Clone",
    "Event",
    "Farm",
    "Image",
    "NotConfigured",
    "Operation",
    "OperationFailed",
    "Page",
    "Problem",
    "Run",
    "Runs",
    "Schedule",
    "Server",
    "Snapshot",
    "Unreachable",
    "__version__",
]
