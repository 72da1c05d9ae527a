"""Data sets presented as conversations."""
