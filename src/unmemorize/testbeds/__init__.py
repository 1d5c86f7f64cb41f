"""Small models whose memory is known, trained here from captioned pictures."""
