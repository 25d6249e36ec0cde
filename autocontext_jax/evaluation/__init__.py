"""Scores of each class, their statistics, and the report."""
