"""The mathematics: a Bernoulli policy over units, moved by losses alone. Nothing here knows what a model is."""
