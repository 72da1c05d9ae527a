"""The report card of a chain of runs: read from disk (collect), put in order (card), written (markdown, html)."""
