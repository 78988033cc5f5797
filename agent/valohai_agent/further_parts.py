"""Asks the control plane for further and fresh parts of an upload, and to join parts that no signed request can join."""

from __future__ import annotations

import itertools
from collections.abc import Callable

from valohai_agent.errors import OutputError
from valohai_agent.protocol import GrantRequest, Grants, Parts

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
