"""Measures that training and evaluation share."""
