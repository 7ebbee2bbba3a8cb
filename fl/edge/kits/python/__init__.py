"""The device kit in Python: the reference for the others, for instruments that run Linux, and for simulation."""

from fl.edge.kits.python.connection import GatewayConnection
from fl.edge.kits.python.data import Batch, Dataset, DataSource, Filter
from fl.edge.kits.python.device import Device, DeviceSettings
from fl.edge.kits.python.trust import GatewayProof, Trust

__all__ = [
    "Batch",
    "DataSource",
    "Dataset",
    "Device",
    "DeviceSettings",
    "Filter",
    "GatewayConnection",
    "GatewayProof",
    "Trust",
]
