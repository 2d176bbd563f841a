"""Mini-batches of labelled edges: composition, sampling, negatives."""
