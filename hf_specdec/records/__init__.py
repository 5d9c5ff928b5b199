"""What happened: statistics and traces."""
