"""The client: links, routing, retries and deadlines; everything above stands on it."""
