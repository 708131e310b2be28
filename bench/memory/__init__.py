"""Bytes by state of runs that share the device by turns."""
