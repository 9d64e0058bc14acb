"""From logits, or features, to the statistics of rows, and from these by :mod:`largemargin.loss` to a loss.

whole            all classes of a row, and the large-margin loss: by a kernel of the whole loss, else by the next two
dense            all classes of a row, with one target a row
all_classes      all classes of a row, each as the target, for class probabilities
linear           features times a classifier, one tile of logits at a time (tiles); its target may be a teacher
shards           classes split over ranks (collectives); sharded_linear does it one tile at a time
dtensors         DTensor logits: whole, dense or shards on each rank's part
parts            the sums of some classes of a row, for linear, shards and sharded_linear; shares is the same for probabilities
"""
