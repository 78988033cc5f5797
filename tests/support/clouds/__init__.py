"""Clouds for tests: emulators, stand-ins, and what the contract suite of the drivers needs of each."""
