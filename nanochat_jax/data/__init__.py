"""Text to token rows on disk, and rows to batches. Nothing here holds state other than the step."""
