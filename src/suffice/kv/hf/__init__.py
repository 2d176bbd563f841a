"""What the cache needs from transformers: loading, fingerprints, rotary embeddings, tensor parallelism, offloading."""
