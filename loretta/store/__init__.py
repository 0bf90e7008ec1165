"""Many adapters of one configuration in one folder: appended to one file of numbers, found by an index.

    index.json    what all adapters share, and of each its row and checksum; replaced in whole, by renaming
    rows-N.bin    one row of numbers an adapter, memory-mapped; N grows when removed rows are left out
    lock          held by the one process that writes

A row is all tensors of an adapter, one after another, in the order of their names. So one more adapter is one write at
the end of a file, one read fetches it, and where rows are damaged or cut off the others can be read. A safetensors file
allows neither: its header comes first and has all sizes.
"""

from .index import INDEX, Damaged
from .store import AdapterStore

__all__ = ["INDEX", "AdapterStore", "Damaged"]
