"""The charter: who may decide what, with which threshold, as TUF metadata; founding, changing, verifying it."""

from policies.charter.content import Charter
from policies.charter.store import read_store, write_store
from policies.charter.trust import load_charter

__all__ = ["Charter", "load_charter", "read_store", "write_store"]
