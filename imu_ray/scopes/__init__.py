"""What may move: its parameters, and how statistics, gradients and metrics under changed parameters are computed."""
