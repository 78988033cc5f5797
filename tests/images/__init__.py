"""Images that the Docker tests run in, built on this machine: no image registry is needed."""
