"""Scores per organ, their statistics and the table."""
