"""The same work by NVIDIA FLARE, by Flower, and here, in one run (`make bench-peers` makes the peers' environments)."""
