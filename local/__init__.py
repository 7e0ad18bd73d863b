"""The whole system on one machine: `python -m local run`. Nothing here is deployed."""
