"""What the Docker daemon's refusals mean for a worker group: pure tables, from its words and status codes."""

from __future__ import annotations

from valohai_dagster.capacity.clouds.base import Trouble

# The daemon has no codes of its own, only HTTP statuses and sentences. First match wins; all in lower case.
SENTENCES: tuple[tuple[str, str, Trouble], ...] = (
    ("no space left on device", "NoSpace", Trouble.capacity),
    ("cannot allocate memory", "NoMemory", Trouble.capacity),
    ("no available ipv4 addresses", "NoAddresses", Trouble.capacity),
    ("non-overlapping ipv4 address pool", "NoAddresses", Trouble.capacity),
    ("toomanyrequests", "TooManyRequests", Trouble.throttled),
    ("unauthorized", "Unauthorized", Trouble.credentials),
    ("pull access denied", "NoSuchImage", Trouble.invalid),
    ("manifest unknown", "NoSuchImage", Trouble.invalid),
    ("no such image", "NoSuchImage", Trouble.invalid),
    ("invalid reference format", "NoSuchImage", Trouble.invalid),
    ("[errno 13] permission denied", "PermissionDenied", Trouble.credentials),  # of the socket
    ("certificate verify failed", "BadCertificate", Trouble.credentials),
    ("could not select device driver", "NoGpu", Trouble.invalid),
    ("executable file not found", "NoShell", Trouble.invalid),
    ("network", "BadNetwork", Trouble.invalid),
)

STATUSES: dict[int, tuple[str, Trouble]] = {
    400: ("BadRequest", Trouble.invalid),
    401: ("Unauthorized", Trouble.credentials),
    403: ("Forbidden", Trouble.credentials),
    404: ("NotFound", Trouble.invalid),
    409: ("Conflict", Trouble.outage),  # something of that name is on its way out: try again
    429: ("TooManyRequests", Trouble.throttled),
}


def classify(status: int | None, words: str) -> tuple[str, Trouble]:
    """A code for it and what kind of no it is. `status` is None when no answer came at all."""
    lower = words.lower()
    for sentence, code, trouble in SENTENCES:
        if sentence in lower and (sentence != "network" or status in (400, 403, 404)):
            return code, trouble
    if status is None:
        return "Unreachable", Trouble.outage
    return STATUSES.get(status, (f"HTTP {status}", Trouble.outage))
