"""`python -m fl.edge.kits.vectors OUT`: what every device kit's core is tested with, made by the reference's own code.

Nothing in it is random: keys come from names, signatures are deterministic, the clock stands still. So the same code
writes the same bytes, and a change of the protocol shows as a change of these files. What a kit alone can make (a
sealed request, a compressed difference) it writes for the reference to open (tests/fl/edge/test_kit_vectors.py).
"""
