"""Prices, credits and usage: values only, no job."""
