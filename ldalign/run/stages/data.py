"""The stage data: the rows as they are used, prepared by `ldalign.run.prepared`."""

from ldalign.run.context import Context
from ldalign.run.prepared import DATA
from ldalign.run.stage import Cost, Stage


def _cost(ctx: Context, name: str) -> Cost:
    return Cost()  # it is made before any cost is asked for


DATA_STAGE = Stage(DATA, _cost)
