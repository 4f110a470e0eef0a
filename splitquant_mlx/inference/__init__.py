"""Chat and the HTTP server."""
