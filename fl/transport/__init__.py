"""How models, updates and words travel: between a script and its site, and between sites, users and the server."""

import os

os.environ.setdefault("GRPC_VERBOSITY", "ERROR")  # read by grpc when it is imported; a failed handshake is told by us
