"""The real planner and reconciler against a made-up world: seeded, with a clock of its own, so that hours take moments."""
