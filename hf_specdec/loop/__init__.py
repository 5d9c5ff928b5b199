"""The decoding loop: draft, verify, accept, commit, roll back. Start reading at `decoding.py`."""
