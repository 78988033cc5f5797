"""Durations of valohai.yaml (Y-19)."""
