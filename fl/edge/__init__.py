"""Devices: the protocol that they speak, the gateway that they speak it to, the tree above, the kits that devices run."""
