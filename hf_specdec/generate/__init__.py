"""The door: what `generate()` has prepared becomes a decoding, and its outcome transformers' output classes again."""
