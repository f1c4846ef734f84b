class Skip(Exception):
    """A variant that this machine does not have; the message says why."""
