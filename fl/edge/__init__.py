"""Devices: the protocol that they speak, the gateways that they speak it to, the tree above, the kits that they run."""
