"""What each stage adds to the one training loop: its flags and defaults, its rows, its evaluations."""
