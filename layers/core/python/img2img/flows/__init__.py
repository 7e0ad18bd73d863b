"""The use cases: what happens to a job, from its request to its end."""
