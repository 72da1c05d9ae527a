"""nanochat in JAX: from raw text to a chat model, one readable file per concept."""
