"""What the operator of a deployed stack does."""
