"""The same arithmetic, faster: attention of few queries, and packed weights. No model is changed."""
