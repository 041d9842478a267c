"""The stage data: the rows as they are used, prepared by `ldalign.run.prepared` before any cost is
asked for.
"""

from ldalign.run.prepared import DATA
from ldalign.run.stage import Stage

DATA_STAGE = Stage(DATA)
