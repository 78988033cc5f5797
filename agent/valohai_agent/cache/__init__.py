"""Input files that stay on the worker or on a share of the workers, so that they are fetched once (I-33 to I-35)."""
