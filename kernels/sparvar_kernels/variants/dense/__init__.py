"""Every key."""
