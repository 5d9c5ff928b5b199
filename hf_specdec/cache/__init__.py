"""Caches whose rows have lengths of their own, and how they go back to committed tokens."""
