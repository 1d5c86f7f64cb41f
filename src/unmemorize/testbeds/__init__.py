"""Small models whose memory is known: planted, trained beside a twin, or injected into chosen neurons."""
