"""The committed tokens, and the acceptance of drafts after them."""
