"""Runs the forwards of a model, and probes the model before it is used."""
