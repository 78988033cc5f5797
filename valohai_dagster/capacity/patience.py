"""How long a reconciler waits before it believes, repeats or gives up."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta


@dataclass(frozen=True, kw_only=True)
class Patience:
    """Lists of clouds lag behind: what one has not got may still come, and what one has got may be gone.

    A machine counts as gone when it has been missing in `confirm_lists` lists in a row for `confirm`, and was made more
    than `fresh` ago unless it was to end. One that nobody here launched and no worker of which checks in is terminated after `orphan`. A call
    of which nothing was seen after `settle` (launches) or `effect` (others) has had none. `ask_again`: how often a launch
    that was accepted is asked after. `list_every`: an older list is not used. `remind`: workers that do not drain although
    they were told to are told again. `most`: longest wait until a machine that a call did nothing for is tried again. `act`: when a look has taken that long, further stops and ends are left to the next.
    """

    confirm_lists: int = 3
    confirm: timedelta = timedelta(seconds=60)
    fresh: timedelta = timedelta(minutes=5)
    orphan: timedelta = timedelta(minutes=10)
    settle: timedelta = timedelta(minutes=5)
    effect: timedelta = timedelta(minutes=2)
    ask_again: timedelta = timedelta(seconds=30)
    list_every: timedelta = timedelta(seconds=3)
    most: timedelta = timedelta(minutes=10)
    remind: timedelta = timedelta(seconds=15)
    act: timedelta = timedelta(seconds=5)
    seen_every: timedelta = timedelta(seconds=30)  # times of being seen are written that often


PATIENCE = Patience()
