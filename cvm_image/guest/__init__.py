"""Programs that run inside the guest and are measured as part of its archive."""
