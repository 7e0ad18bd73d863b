"""Image to image as a service: the domain package behind every Lambda function."""
