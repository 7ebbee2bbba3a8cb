"""Evidence of NVIDIA GPUs and NVSwitches: SPDM reports, their opaque data, reference manifests, NRAS tokens.

Bytes to objects and back; nothing here is believed, and nothing here reaches out.
"""
