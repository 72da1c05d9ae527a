"""Command-line faces: each parses flags, calls one function and prints."""
