"""What the operator of a deployed stack works with."""
