"""Image to image as a service: the domain package behind every Lambda function."""

# Also in pyproject.toml and in the template's description: a function sees neither.
__version__ = "0.1.0"
