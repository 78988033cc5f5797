"""What the conductor tells about itself: Prometheus metrics, OpenTelemetry spans, structured logs.

Metrics and spans need the extra `observability`; without it everything else works the same.
"""
