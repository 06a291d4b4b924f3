"""Tests, and the check of the tables in docs/."""
