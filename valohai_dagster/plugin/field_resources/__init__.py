"""The resources of dagster-aws, dagster-gcp and dagster-azure for stores of the settings; one file per package.

They hold a store's name only and read its settings where they are used: what a resource is configured with can be
read in the UI, so no secret may be part of it.
"""
