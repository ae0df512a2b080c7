"""What a model is worth: perplexity, size, latency, each with its protocol."""
