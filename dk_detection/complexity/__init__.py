"""What networks cost: parameters and FLOPs, counted while they run, and the papers' figures beside them."""
