"""Code that the scripts share: arguments, prompts, measurements, reports. The library never imports it."""
