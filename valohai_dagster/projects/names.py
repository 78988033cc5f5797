"""Legal Dagster names for names that people chose."""
