"""Measuring a service by its own HTTP interface: what a user gets is what is reported."""
