"""Caches whose rows have individual lengths, and their rollback to committed tokens."""
