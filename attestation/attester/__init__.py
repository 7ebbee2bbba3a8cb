"""In the guest: evidence from the secure processor, of the kind that the measured image was built for."""
