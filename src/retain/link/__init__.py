"""retain.link."""
