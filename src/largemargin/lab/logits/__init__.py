"""Files of logits and labels, and what they say about a classifier."""
