"""A simulated fleet: one process that plays hundreds or thousands of worker slots on a real Redis.

It speaks the agents' real protocol (heartbeat, bell, take, renew, report, sealed grants, commands) and fences itself as
they do; only the work is missing. Benchmarks and recovery tests use it where real containers would be the load.
"""
