"""Exact verification, computed alike by both halves (pure)."""
