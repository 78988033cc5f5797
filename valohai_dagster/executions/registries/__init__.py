"""Credentials of private image registries: which an image gets, and where they come from."""
