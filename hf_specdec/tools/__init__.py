"""What the programs in `scripts/` share: arguments, prompts, measurements, reports. The library never imports it."""
