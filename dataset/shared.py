"""A data set opened by all processes of a job, without each doing alone what one can do for all."""

from dataclasses import replace
from functools import partial

from dataset import DataSource, SourceRequest, open_source
from utils import distributed
from utils.launch import World
from utils.neighbours import once_per_machine


def open_shared(request: SourceRequest, world: World) -> DataSource:
    """Open a data set in every process; all of them take part, with the same request.

    Where archives may be downloaded, process 0 does so first, and it measures statistics for the others. Small images
    of a user's own are decoded by one process of a machine for all of them.

    Raises:
        UserError, RunError: as `open_source`; another process is not done after `utils.distributed.PATIENCE`.
    """
    what = "opened the data"
    with once_per_machine(world, what=what) as once:
        opened = partial(open_source, replace(request, once=once))
        # without downloads whoever asks may go on where the data are missing: nobody must wait for a process 0 that did
        return distributed.main_first(world, opened, what=what) if request.download else opened()
