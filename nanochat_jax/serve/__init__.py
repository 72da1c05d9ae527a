"""The web server: the chat page, an OpenAI-compatible API, the reference's event stream, metrics."""
