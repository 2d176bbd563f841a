"""Operations on sparse graphs: adjacency, neighbors, propagation, overlap and sketches."""
