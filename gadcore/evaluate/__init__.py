"""Evaluation: how close the student is to its teacher."""
