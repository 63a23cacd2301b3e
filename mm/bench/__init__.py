"""Measurements of parts: `mm bench`."""
