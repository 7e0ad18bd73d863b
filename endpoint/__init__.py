"""What runs behind the SageMaker endpoint. It imports nothing from the rest of the project."""
