"""One module for each kind of cloud, found by its name; `tests/support/clouds/rig.py` says what is in it."""
