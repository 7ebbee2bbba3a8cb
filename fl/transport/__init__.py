"""How models, updates and words travel: between a script and its site, and between sites, users and the server."""

import os

os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # read by grpc when it is imported; failed handshakes are told by us
