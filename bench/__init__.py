"""Benchmarks: each is a module with a table for people and one line of JSON for machines."""
