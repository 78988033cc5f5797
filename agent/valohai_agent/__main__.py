"""`python -m valohai_agent`, for supervisors that know their interpreter but not its scripts."""

from valohai_agent.cli import main

main()
