"""Access to transformers models: loading, model facts, fingerprints, rotary embeddings, sharding, offloading."""
