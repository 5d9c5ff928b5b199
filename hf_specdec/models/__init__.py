"""What drives a model's forwards, and what is asked of a model before it is driven."""
