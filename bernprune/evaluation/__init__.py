"""What a model is worth: perplexity and latency, each with its protocol."""
