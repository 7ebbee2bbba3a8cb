"""The guest's own programs, in the verified root at /usr/lib/sealwright/guest; they use the standard library alone."""
