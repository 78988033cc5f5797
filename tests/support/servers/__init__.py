"""Object stores for tests: real servers and emulators that `make setup-servers` installs into .servers/."""
