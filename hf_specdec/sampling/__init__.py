"""The committed tokens, and which drafts are accepted after them."""
