"""What the control plane grants for uploads: one request or parts, further and fresh parts, the joining of parts."""

from __future__ import annotations

import itertools
from collections.abc import Callable

from valohai_agent.errors import OutputError
from valohai_agent.protocol import GrantRequest, Grants, Parts, UploadGrant

_NUMBERS = itertools.count(1)


def further_parts(
    request_grants: Callable[[list[GrantRequest]], Grants], upload_id: str
) -> Callable[[int, int], Parts]:
    """For `Transferer.upload(more=...)`. What is refused raises OutputError with the control plane's reason."""

    def ask(first: int, count: int) -> Parts:
        request = GrantRequest(
            id=f"parts-{next(_NUMBERS)}", kind="parts", name=upload_id, first=first, count=count
        )
        answer = request_grants([request])
        granted = answer.uploads.get(request.id)
        if granted is None or granted.parts is None:
            raise OutputError(answer.refused.get(request.id, "the control plane granted no parts"))
        return granted.parts

    return ask


def granted(grants: Grants, request_id: str) -> UploadGrant | str:
    """What was granted for one request, or why not."""
    if request_id in grants.uploads:
        return grants.uploads[request_id]
    return grants.refused.get(request_id, "the control plane granted no place to write it")
