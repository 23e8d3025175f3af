"""What the dispatcher knows: the registered ops of `linear_logps`, exact and sparse."""
