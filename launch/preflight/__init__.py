"""What is checked on every node before a run: `CHECKS` in checks.py, a line a check."""
