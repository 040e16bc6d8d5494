"""Bad images: those that turned bad after indexing, and the diagnosis of a batch that failed."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Collection
from dataclasses import replace
from typing import Literal

from cjepa_fast.errors import UserError
from cjepa_fast.feed.decode import Failed, Options, stream
from cjepa_fast.feed.manifest import SampleError
from cjepa_fast.feed.mixture import Mixture
from cjepa_fast.feed.read import Request

_PAUSES_S = (1.0, 5.0, 30.0)  # before each further try to read from storage that seems gone

log = logging.getLogger(__name__)


class BadImages:
    """The ids of images that turned bad after indexing, and the policy for another one.

    Args:
        policy: "error" raises; "skip" leaves the image out from then on, up to 0.1 % of the images (at least one).
        ids: images known to be bad.
    """

    def __init__(self, source: Mixture, policy: Literal["error", "skip"] = "error", ids: Collection[int] = ()) -> None:
        self._source, self._policy, self.ids = source, policy, frozenset(ids)

    def add(self, ids: Collection[int]) -> None:
        """Add images that another rank or an earlier run found.

        Raises:
            UserError: they are too many now.
        """
        self.ids |= frozenset(ids)
        n = len(self._source)
        if len(self.ids) > max(1, n // 1000):
            name = self._source.name(max(ids))
            raise UserError(f"{len(self.ids)} of {n:,} images turned bad, over the limit of 0.1 %, such as {name}")

    def settle(self, faults: dict[int, str]) -> None:
        """Apply the policy to newly found faults, by id.

        Raises:
            UserError: the policy is "error", or the bad images are too many.
        """
        if self._policy == "error":
            raise UserError(f"{next(iter(faults.values()))} (or let data.on_error skip show another in its place)")
        for fault in faults.values():
            log.warning("skipped from now on: %s", fault)
        self.add(faults)


def diagnose(source: Mixture, failed: Failed, options: Options, failures: int, bad: BadImages) -> None:
    """Find and settle the bad images of a batch that failed for the `failures`th time.

    Returns if another try makes sense. A failure that no image explains is tried again three times. Storage that is
    gone is waited for: one, five and thirty seconds.

    Raises:
        UserError: an image is bad and the policy is "error", too many are, or the storage stays away.
    """
    for request in failed.requests:
        faults = _unread(source, request) if request.unread else _faults(source, request, options)
        if request.unread and len(faults) == len(set(request.ids.tolist())) > 1:
            what = f"{next(iter(faults.values()))}. No image of its batch can be read: is the storage gone?"
            if failures > len(_PAUSES_S):
                raise UserError(f"{what} Go on with --resume when it is back")
            log.warning("%s Trying again in %g s", what, _PAUSES_S[failures - 1])
            time.sleep(_PAUSES_S[failures - 1])
            return
        if faults:
            bad.settle(faults)
            return
    if failures > len(_PAUSES_S):
        raise failed.error or UserError("images could not be read, and can be now; go on with --resume")
    why = failed.error or "some could not be read"
    log.warning("a batch failed although each of its images is sound now; trying again (%s)", why)


def _unread(source: Mixture, request: Request) -> dict[int, str]:
    """Read each image of a request again and return the faults by id.

    Storage that went away during the first read, or is back by now, is no fault of an image.
    """
    again = itertools.chain.from_iterable(source.read_many(request.ids[k : k + 1]) for k in range(len(request.ids)))
    return {error.sample: str(error) for error in again if isinstance(error, SampleError)}


def _faults(source: Mixture, request: Request, options: Options) -> dict[int, str]:
    """Return faults of a request's images by id: those their bytes show, else those of decoding each image alone."""
    found = {i: fault for i in request.ids.tolist() if (fault := source.fault(i))}
    if found:
        return found
    alone = replace(options, batch_size=1, prefetch=1, place=options.place._replace(threads=1))
    for k, i in enumerate(request.ids.tolist()):
        one = slice(k, k + 1)
        single = Request(ids=request.ids[one], inputs={name: x[one] for name, x in request.inputs.items()}, step=0)
        try:
            list(stream(source, iter([single]), alone))
        except Failed:
            found[i] = f"{source.name(i)}: DALI cannot decode it"
    return found
