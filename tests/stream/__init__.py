"""Stream processing."""
