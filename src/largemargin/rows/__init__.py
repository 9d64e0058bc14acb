"""From logits, or features, to the statistics of rows, and from these by :mod:`largemargin.loss` to a loss.

dense            all classes of a row in one place, one target per row
whole            the same, if a kernel computes the whole loss
all_classes      every class as the target, for class probabilities
linear           features times a classifier, one tile of logits at a time (tiles)
shards           classes split over ranks; sharded_linear does it one tile at a time
dtensors         DTensor logits: one of the above on each rank's part
"""
