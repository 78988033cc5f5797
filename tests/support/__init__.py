"""What several tests share: servers started from wheels, a clock that tests move, and the demand rule."""
