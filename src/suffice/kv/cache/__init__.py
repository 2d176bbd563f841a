"""The compressed cache: layers, reports, serialization, batches of caches."""
