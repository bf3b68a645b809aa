"""A clean page of the store that the processes of a job share, however often they are started anew."""

import secrets
import time

import torch.distributed as dist

INTERVAL = 0.02  # seconds between two looks of process 0 for those who are still to come


def fresh_store(store: dist.Store, rank: int, world_size: int, timeout: float) -> dist.Store:
    """The part of `store` that belongs to this start of these processes alone.

    torchrun keeps one store over all its restarts. What the killed processes left in it (addresses where nobody
    listens any more, heartbeats) would be read as the new ones'. The number of restarts cannot tell them apart,
    because the machines of a job count them differently. So process 0 draws a name for this start, and every other one
    asks for it under a name that it draws itself: no answer can be older than its question.

    Args:
        store: where all processes of the job meet; may hold anything of earlier starts.
        rank, world_size: of this process.
        timeout: seconds that process 0 waits for the others. The others wait as long as `store` does.

    Raises:
        RuntimeError: somebody did not come in time.
    """
    page = dist.PrefixStore("starts", store)
    own = secrets.token_hex(8)
    if rank > 0:
        page.set(f"question/{rank}", own)
        start = page.get(f"answer/{own}").decode()
        page.set(f"heard/{start}/{rank}", "")
        return dist.PrefixStore(start, store)
    deadline = time.monotonic() + timeout
    missing = set(range(1, world_size))
    while missing:
        for other in sorted(missing):
            if page.check([f"question/{other}"]):  # this may be an earlier start's, until the new one stands there
                page.set(f"answer/{page.get(f'question/{other}').decode()}", own)
            if page.check([f"heard/{own}/{other}"]):
                missing.remove(other)
        if missing and time.monotonic() > deadline:
            raise RuntimeError(f"process {', '.join(map(str, sorted(missing)))} did not come within {timeout:.0f} s")
        time.sleep(INTERVAL if missing else 0)
    return dist.PrefixStore(own, store)
