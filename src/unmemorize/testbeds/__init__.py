"""Small models whose memory is known."""
