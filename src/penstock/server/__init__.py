"""HTTP: the OpenAI-compatible server, its page and its metrics. Knows text and sockets, no tensor and no block."""
