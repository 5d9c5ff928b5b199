"""Records of what happened: statistics and traces."""
