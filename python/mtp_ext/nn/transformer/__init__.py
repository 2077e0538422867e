"""A Llama-style transformer: the trunk, its layers, attention with rotary positions, the key-value cache."""
