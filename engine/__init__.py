"""Models, data, training and evaluation of PsPG."""

import os

# torch reads this at its first large allocation. On a CPU every large tensor comes in fresh pages; in huge pages a step
# of the full-size model took a sixth less.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
