"""Speaker profiles: storing them, adding to them, and scoring a voice against them."""
