"""The API and the three workers. What every process of theirs has first of all stands here, for
a worker that died is replaced by a new process, which is on its way to guests that wait.
"""

import gc
import os

# numpy's linear algebra is not used; its threads take as long to start as all else of it.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# As shipped, Python looks through all that was imported again and again while it imports.
gc.set_threshold(20_000, 50, 100)
