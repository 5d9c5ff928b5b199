"""Pairs of target and draft: finding, loading, comparing, saving and exporting them."""

from .pair import DEMO_PAIR, SpecPair, demo_pair

__all__ = ["DEMO_PAIR", "SpecPair", "demo_pair"]
