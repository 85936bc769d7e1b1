"""State mixers over pages: convolutions, selective scans and delta rules that update a request's state in place."""
