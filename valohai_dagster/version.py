"""The release version; `valohai-agent` is released in lockstep with `valohai-dagster`."""

__version__ = "0.1.0"
