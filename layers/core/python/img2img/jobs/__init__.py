"""A job, and where it is kept."""
