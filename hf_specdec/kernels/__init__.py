"""The same arithmetic, faster: attention for few queries, and packed weights. Models are not changed."""
