"""What `bench.transfer` consists of: the server, the tools beside ours, and the workers that are measured."""
